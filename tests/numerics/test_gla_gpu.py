"""On a GPU, fla's Triton path gives what the plain PyTorch path gives: values and gradients."""

from __future__ import annotations

import pytest
import torch

from ssm_train.adapters.base import ModelSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Triton multiplies fp32 matrices in TF32 by default: about three decimal digits.
TOLERANCE = 1e-2


def make_model(kernels: str, **options):
    pytest.importorskip("fla", reason="fla needs Linux")
    from ssm_train.adapters.gla import GLA

    config = {
        "model_type": "gla",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "vocab_size": 97,
        "intermediate_size": 256,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 96,
    }
    torch.manual_seed(0)
    spec = ModelSpec(new_model=config | options, kernels=kernels, device="cuda")
    prepared = GLA.prepare(spec)
    assert prepared.kernels["gla"] == ("reference" if kernels == "reference" else "triton (fla)")
    return prepared.model


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize("options", [{}, {"use_short_conv": True}, {"fuse_norm": False}])
@pytest.mark.parametrize("rows", ["full", "padded", "packed"])
def test_triton_equals_reference(options, rows):
    ids = torch.randint(1, 96, (1 if rows == "packed" else 2, 150)).cuda()
    inputs: dict[str, torch.Tensor] = {}
    if rows == "packed":
        inputs["cu_seqlens"] = torch.tensor([0, 70, 71, 150], dtype=torch.int32).cuda()
    if rows == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :40] = 0
    keep = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    results = {}
    for kernels in ("triton", "reference"):
        model = make_model(kernels, **options)
        logits = model(ids, use_cache=False, **inputs).logits[keep]
        logits.logsumexp(-1).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        results[kernels] = logits, gradients
    (got, got_gradients), (expected, gradients) = results["triton"], results["reference"]
    assert relative_error(got, expected) < TOLERANCE
    for name, gradient in gradients.items():
        assert relative_error(got_gradients[name], gradient) < 5 * TOLERANCE, name


@pytest.mark.parametrize("options", [{}, {"use_short_conv": True}])
def test_cached_decode_equals_full_forward(options):
    model = make_model("auto", **options).eval()
    ids = torch.randint(1, 96, (2, 80)).cuda()
    with torch.no_grad():
        full = model(ids).logits
        out = model(ids[:, :70], use_cache=True)
        pieces = [out.logits]
        for token in ids[:, 70:].split(1, dim=1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            pieces.append(out.logits)
    assert relative_error(torch.cat(pieces, 1), full) < TOLERANCE


def test_bf16_autocast_trains():
    model = make_model("triton")
    ids = torch.randint(1, 96, (2, 130)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    exact = make_model("reference")(ids, labels=ids).loss
    assert abs(float(loss - exact)) < 0.02 * float(exact)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_another_length_compiles_nothing(monkeypatch):
    """Rows of a padded batch differ from step to step; a compilation takes seconds."""
    model = make_model("triton", use_short_conv=True)
    compiled: list[str] = []
    monkeypatch.setattr(
        "triton.knobs.runtime.jit_post_compile_hook",
        lambda **compilation: compiled.append(compilation["fn"].name),
    )
    for length in (256, 272, 400, 640):
        if length == 272:
            assert compiled  # the first length did
            compiled.clear()
        ids = torch.randint(1, 96, (2, length)).cuda()
        model(ids, labels=ids).loss.backward()
    assert not compiled
