"""On a GPU, mamba_ssm's kernels give what the plain PyTorch path gives: values and gradients."""

from importlib.util import find_spec

import pytest
import torch

from ssm_train.adapters import registry
from ssm_train.adapters.base import ModelSpec
from ssm_train.adapters.mamba_cuda import separated

FAMILIES = {
    "mamba": {"hidden_size": 64, "state_size": 16, "time_step_rank": 4},
    "mamba2": {"hidden_size": 64, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2},
}


def test_separators_stand_between_documents():
    cu_seqlens = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    assert separated(cu_seqlens, 6).tolist() == [0, 1, 3, 5, 6, 7]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("mamba_ssm") is None,
    reason="needs a CUDA device and mamba_ssm",
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", ["full", "padded", "packed"])
def test_mamba_ssm_equals_reference(family, rows):
    ids = torch.randint(1, 96, (1 if rows == "packed" else 2, 150)).cuda()
    inputs: dict[str, torch.Tensor] = {}
    if rows == "packed":
        inputs["cu_seqlens"] = torch.tensor([0, 70, 71, 150], dtype=torch.int32).cuda()
    if rows == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :40] = 0
    keep = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    config = {"model_type": family, "num_hidden_layers": 2, "vocab_size": 97, **FAMILIES[family]}
    results = {}
    for kernels in ("auto", "reference"):
        torch.manual_seed(0)
        spec = ModelSpec(new_model=config, kernels=kernels, device="cuda")
        adapter, _ = registry.resolve(spec)
        prepared = adapter.prepare(spec)
        used = " ".join(prepared.kernels.values())
        assert ("mamba_ssm" in used) == (kernels == "auto"), used
        logits = prepared.model(ids, use_cache=False, **inputs).logits[keep]
        logits.logsumexp(-1).sum().backward()
        gradients = {n: p.grad for n, p in prepared.model.named_parameters()}
        results[kernels] = logits.detach(), gradients
    fast, plain = results["auto"], results["reference"]
    assert relative_error(fast[0], plain[0]) < 2e-3
    for name, gradient in plain[1].items():
        assert relative_error(fast[1][name], gradient) < 1e-2, name


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
