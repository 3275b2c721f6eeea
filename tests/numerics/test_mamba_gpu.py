"""On a GPU, mamba_ssm's kernels give what the plain PyTorch path gives, gradients too. Without one,
a loop that takes the same tensors stands in for the scan's kernel."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from ssm_train.adapters import mamba_cuda, registry
from ssm_train.adapters.base import ModelSpec
from ssm_train.adapters.mamba_cuda import lay_out, selective_scan_cuda
from ssm_train.kernels.selective_scan import selective_scan

FAMILIES = {
    "mamba": {"hidden_size": 64, "state_size": 16, "time_step_rank": 4},
    "mamba2": {"hidden_size": 64, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2},
}


def test_separators_and_states_stand_before_documents():
    cu_seqlens, cpu = torch.tensor([0, 2, 3, 6], dtype=torch.int32), torch.device("cpu")
    places, starts, length = lay_out(cu_seqlens, 6, 0, cpu)
    assert (places.tolist(), starts.tolist(), length) == ([0, 1, 3, 5, 6, 7], [0, 3, 5], 8)
    places, starts, length = lay_out(cu_seqlens, 6, 2, cpu)
    assert (places.tolist(), starts.tolist(), length) == ([2, 3, 7, 11, 12, 13], [2, 7, 11], 14)
    places, starts, length = lay_out(None, 3, 4, cpu)
    assert (places.tolist(), starts.tolist(), length) == ([4, 5, 6], [4], 7)


def scan_inputs(rows, per_channel, device="cpu", states_given=0):
    """Arguments of the scan; `per_channel`: which of B and C every channel has its own of;
    `states_given`: initial states, none or one for all or one a row or document."""
    generator = torch.Generator().manual_seed(0)
    batch, length, channels, states = (1 if rows == "packed" else 2), 11, 6, 4

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def matrix(name):
        return normal(batch, length, *([channels] if name in per_channel else []), states)

    values = {
        "u": normal(batch, length, channels),
        "dt": F.softplus(normal(batch, length, channels)),
        "A": -torch.rand(channels, states, generator=generator) * 4,
        "B": matrix("B"),
        "C": matrix("C"),
        "D": normal(channels),
        "z": normal(batch, length, channels),
    }
    if states_given:
        values["initial_state"] = 3 * normal(states_given, channels, states)
    values = {name: value.to(device).requires_grad_() for name, value in values.items()}
    if rows == "packed":
        cu_seqlens = torch.tensor([0, 4, 5, 11], dtype=torch.int32, device=device)
        return values, {"cu_seqlens": cu_seqlens}
    return values, {"output_final_state": True}


def loop_over_channels_first(u, dt, A, B, C, D, z, return_last_state):
    """What mamba_ssm's kernel computes of u, dt, z [B, d, T] and B, C [B, n, T] or [B, G, n, T] for
    G groups of channels, as many for both."""
    B, C = (x if x.ndim == 4 else x[:, None] for x in (B, C))
    assert B.shape == C.shape and u.shape[1] % B.shape[1] == 0
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1).double() for x in (B, C))
    h, outputs = u.new_zeros(*u.shape[:2], A.shape[1], dtype=torch.float64), []
    for t in range(u.shape[-1]):
        h = torch.exp(dt[..., t, None] * A) * h + (dt * u)[..., t, None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1) + D * u[..., t])
    y = (torch.stack(outputs, -1) * F.silu(z)).float()
    return (y, h.detach()) if return_last_state else y  # the kernel's has no gradient either


def assert_scans_agree(rows, per_channel, device="cpu", states_given=0):
    values, options = scan_inputs(rows, per_channel, device, states_given)
    results = []
    for scan in (selective_scan_cuda, selective_scan):
        y, state = scan(**values, **options)
        loss = y.square().sum() + (0 if state is None else state.sin().sum())
        gradients = torch.autograd.grad(loss, list(values.values()))
        results.append([y, *([] if state is None else [state]), *gradients])
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape and relative_error(got, expected) < 1e-4


each_layout = pytest.mark.parametrize(
    ("rows", "per_channel"), [(r, c) for r in ("full", "packed") for c in ("", "B", "C", "BC")]
)


@each_layout
def test_the_scan_s_kernel_gets_its_layout(rows, per_channel, monkeypatch):
    monkeypatch.setattr(mamba_cuda, "load_kernel", lambda *_: loop_over_channels_first)
    assert_scans_agree(rows, per_channel)


each_state = pytest.mark.parametrize(
    ("rows", "per_channel", "states_given"),
    [("full", "", 1), ("full", "", 2), ("full", "BC", 1), ("packed", "", 1), ("packed", "B", 3)],
)


@each_state
def test_the_scan_s_kernel_starts_from_states(rows, per_channel, states_given, monkeypatch):
    monkeypatch.setattr(mamba_cuda, "load_kernel", lambda *_: loop_over_channels_first)
    assert_scans_agree(rows, per_channel, states_given=states_given)


def test_a_last_state_has_the_gradient_of_the_first_alone(monkeypatch):
    monkeypatch.setattr(mamba_cuda, "load_kernel", lambda *_: loop_over_channels_first)
    values, options = scan_inputs("full", "", states_given=1)
    values = {k: v.detach().requires_grad_(k == "initial_state") for k, v in values.items()}
    gradients = [
        torch.autograd.grad(scan(**values, **options)[1].sum(), values["initial_state"])[0]
        for scan in (selective_scan_cuda, selective_scan)
    ]
    assert relative_error(*gradients) < 1e-5


def test_a_channel_without_memory_forgets_its_state(monkeypatch):
    """As SD_LORA makes them: A = -exp(69)."""
    monkeypatch.setattr(mamba_cuda, "load_kernel", lambda *_: loop_over_channels_first)
    values, options = scan_inputs("full", "", states_given=1)
    values["A"] = values["A"].detach().index_fill(0, torch.tensor([2]), -1e30).requires_grad_()
    results = [scan(**values, **options) for scan in (selective_scan_cuda, selective_scan)]
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected) < 1e-5


on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("mamba_ssm") is None,
    reason="needs a CUDA device and mamba_ssm",
)


@pytest.mark.gpu
@on_a_gpu
@each_layout
def test_the_scan_s_kernel_equals_reference(rows, per_channel):
    assert_scans_agree(rows, per_channel, "cuda")


@pytest.mark.gpu
@on_a_gpu
@each_state
def test_the_scan_s_kernel_with_states_equals_reference(rows, per_channel, states_given):
    assert_scans_agree(rows, per_channel, "cuda", states_given)


@pytest.mark.gpu
@on_a_gpu
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
    return float((got - expected).detach().norm() / expected.detach().norm())
