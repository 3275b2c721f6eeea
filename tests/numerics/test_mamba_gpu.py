"""On a GPU, the Triton kernels give what the plain PyTorch path gives, gradients too."""

from importlib.util import find_spec

import pytest
import torch

from ssm_train.adapters import registry
from ssm_train.adapters.base import ModelSpec

FAMILIES = {
    "mamba": {"hidden_size": 64, "state_size": 16, "time_step_rank": 4},
    "mamba2": {"hidden_size": 64, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2},
}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", ["full", "padded", "packed"])
def test_triton_equals_reference(family, rows):
    if family == "mamba2" and find_spec("mamba_ssm") is None:
        pytest.skip("Mamba-2's kernels are mamba_ssm's")
    ids = torch.randint(1, 96, (1 if rows == "packed" else 2, 300)).cuda()
    inputs: dict[str, torch.Tensor] = {}
    if rows == "packed":
        inputs["cu_seqlens"] = torch.tensor([0, 70, 71, 300], dtype=torch.int32).cuda()
    if rows == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :40] = 0
    keep = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    config = {"model_type": family, "num_hidden_layers": 2, "vocab_size": 97, **FAMILIES[family]}
    results = {}
    for kernels in ("triton", "reference"):
        torch.manual_seed(0)
        spec = ModelSpec(new_model=config, kernels=kernels, device="cuda")
        adapter, _ = registry.resolve(spec)
        prepared = adapter.prepare(spec)
        assert ("triton" in str(prepared.kernels).lower()) == (kernels == "triton")
        logits = prepared.model(ids, use_cache=False, **inputs).logits[keep]
        logits.logsumexp(-1).sum().backward()
        gradients = {n: p.grad for n, p in prepared.model.named_parameters()}
        results[kernels] = logits.detach(), gradients
    fast, plain = results["triton"], results["reference"]
    # mamba_ssm's kernels multiply fp32 matrices in TF32.
    value, gradient = (1e-5, 1e-4) if family == "mamba" else (2e-3, 1e-2)
    assert relative_error(fast[0], plain[0]) < value
    for name, expected in plain[1].items():
        assert relative_error(fast[1][name], expected) < gradient, name
