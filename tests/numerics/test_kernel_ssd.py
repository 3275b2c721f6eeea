"""ssd against transformers' chunked scan, a float64 loop of the paper's equation, gradcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gradients import value_and_gradients
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from ssm_train.kernels.ssd import ssd

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def make_inputs(
    rows=2, length=37, heads=4, dim=3, groups=2, states=5, documents=None, dtype=torch.float32
):
    torch.manual_seed(length)
    values = {
        "x": torch.randn(rows, length, heads, dim),
        "dt": F.softplus(torch.randn(rows, length, heads)),
        "A": -torch.rand(heads) * 4,
        "B": torch.randn(rows, length, groups, states),
        "C": torch.randn(rows, length, groups, states),
        "D": torch.randn(heads),
        "initial_state": torch.randn(documents or rows, heads, dim, states),
    }
    return {name: v.to(dtype).requires_grad_() for name, v in values.items()}


def scan_by_the_paper(x, dt, A, B, C, D, initial_state) -> tuple[Tensor, Tensor]:
    """The recurrence of arXiv 2405.21060 (equation 1, A_t a scalar times I), in float64."""
    x, dt, A, B, C, D, h = (v.double() for v in (x, dt, A, B, C, D, initial_state))
    heads = x.shape[2]
    group = torch.arange(heads) // (heads // B.shape[2])  # of each head
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t, group])
        outputs.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t, group]) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), h


def scan_with(**options):
    return lambda **inputs: ssd(**inputs, **options, output_final_state=True)


def assert_close(actual, expected, tolerance=1e-5):
    for name, a, e in zip(("y", "state", *NAMES), actual, expected, strict=True):
        scale = e.double().abs().max().clamp(min=1)
        error = ((a.double() - e.double()).abs().max() / scale).item()
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("chunk_size", [1, 8, 64])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_values_and_gradients_follow_the_paper(length, chunk_size):
    inputs = make_inputs(length=length)
    actual = value_and_gradients(scan_with(chunk_size=chunk_size), inputs)
    assert_close(actual, value_and_gradients(scan_by_the_paper, inputs))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_agrees_with_transformers(groups):
    inputs = make_inputs(rows=3, length=83, groups=groups, dim=8, states=16)

    def theirs(x, dt, A, B, C, D, initial_state):
        return mamba2_chunk_scan(
            *(x, dt, A, B, C), 32, D=D, initial_states=initial_state, return_final_states=True
        )

    actual = value_and_gradients(scan_with(chunk_size=16), inputs)
    assert_close(actual, value_and_gradients(theirs, inputs))


def test_gradcheck():
    inputs = make_inputs(length=5, heads=2, dim=2, groups=1, states=2, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda *v: scan_with(chunk_size=3)(**dict(zip(inputs, v, strict=True))),
        tuple(inputs.values()),
    )


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("offset", range(1, 11))
def test_packed_documents_equal_separate_ones(offset, chunk_size):
    """A boundary at every offset, and a one-token document behind it."""
    inputs = make_inputs(rows=1, length=12, documents=3)
    offsets = [0, offset, offset + 1, 12]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    packed = value_and_gradients(scan_with(cu_seqlens=cu_seqlens, chunk_size=chunk_size), inputs)

    def separate(x, dt, A, B, C, D, initial_state):
        parts = [
            scan_with(chunk_size=chunk_size)(
                x=x[:, s:e],
                dt=dt[:, s:e],
                A=A,
                B=B[:, s:e],
                C=C[:, s:e],
                D=D,
                initial_state=initial_state[i : i + 1],
            )
            for i, (s, e) in enumerate(zip(offsets[:-1], offsets[1:], strict=True))
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])

    assert_close(packed, value_and_gradients(separate, inputs), tolerance=1e-6)


@pytest.mark.parametrize("poison", [1e30, float("nan")])
def test_nothing_leaks_over_a_boundary(poison):
    """The second document is bitwise the same whatever the first holds, and so its gradient."""
    inputs = make_inputs(rows=1, length=20, documents=1)
    scan = scan_with(cu_seqlens=torch.tensor([0, 9, 20], dtype=torch.int32), chunk_size=16)
    y, _ = scan(**inputs)
    first_grad = torch.autograd.grad(y[:, 9:].sum(), inputs["x"])[0][:, :9]
    assert first_grad.abs().max() == 0
    poisoned = dict(inputs, x=inputs["x"].detach().clone())
    poisoned["x"][:, :9] = poison
    assert torch.equal(scan(**poisoned)[0][:, 9:], y[:, 9:])


def test_shared_initial_state_sums_its_gradients():
    inputs = make_inputs(rows=1, length=12, documents=1)
    scan = scan_with(cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32))
    shared = value_and_gradients(scan, inputs)
    h = inputs["initial_state"].detach().repeat(2, 1, 1, 1).requires_grad_()
    copies = value_and_gradients(scan, dict(inputs, initial_state=h))
    assert_close(shared[:-1] + [shared[-1]], copies[:-1] + [copies[-1].sum(0, keepdim=True)])


@pytest.mark.parametrize("split", [1, 16, 36])
def test_halves_chained_by_their_state_equal_the_whole(split):
    inputs = make_inputs(length=37)
    scan = scan_with(chunk_size=8)

    def chained(initial_state, A, D, **timed):
        first = {k: v[:, :split] for k, v in timed.items()}
        second = {k: v[:, split:] for k, v in timed.items()}
        y1, state = scan(**first, A=A, D=D, initial_state=initial_state)
        y2, state = scan(**second, A=A, D=D, initial_state=state)
        return torch.cat([y1, y2], 1), state

    assert_close(value_and_gradients(chained, inputs), value_and_gradients(scan, inputs))


def test_padding_passes_the_state_unchanged():
    inputs = {k: v.detach() for k, v in make_inputs(length=9).items()}
    pads = {"x": (0, 0, 0, 0, 4, 3), "dt": (0, 0, 4, 3), "B": (0, 0, 0, 0, 4, 3)}
    pads["C"] = pads["B"]
    padded = {k: F.pad(v, pads[k]) if k in pads else v for k, v in inputs.items()}
    for name in ("x", "B", "C"):  # padding holds garbage everywhere but in dt
        padded[name][:, :4] = padded[name][:, -3:] = 7.0
    y, state = scan_with()(**inputs)
    y_padded, state_padded = scan_with()(**padded)
    torch.testing.assert_close(y_padded[:, 4:-3], y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state_padded, state, rtol=1e-5, atol=1e-5)
    only_padding = {k: v[:, :4] if k in pads else v for k, v in padded.items()}
    assert torch.equal(scan_with()(**only_padding)[1], inputs["initial_state"])


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_extreme_decays_stay_exact(scale):
    """No exponent of a positive number anywhere: from no decay at all to instant forgetting."""
    inputs = make_inputs(length=64)
    inputs["dt"] = (inputs["dt"].detach() * scale).requires_grad_()
    actual = value_and_gradients(scan_with(), inputs)
    assert all(v.isfinite().all() for v in actual)
    assert_close(actual, value_and_gradients(scan_by_the_paper, inputs))


def test_weak_decay_after_strong_decay_keeps_its_digits():
    """Sums over the chunk are near -40,000 here; in fp32 their differences would be off by 1e-3."""
    inputs = make_inputs(length=64)
    dt = torch.full_like(inputs["dt"], 1e-2)
    dt[:, :32] = 1e3
    inputs["dt"] = dt.requires_grad_()
    inputs["A"] = torch.full_like(inputs["A"], -1.3).requires_grad_()
    inputs["x"] = (inputs["x"].detach() / dt[..., None].detach()).requires_grad_()
    y, state = scan_with(chunk_size=64)(**inputs)
    expected, expected_state = scan_by_the_paper(**inputs)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=1e-5)


def test_bf16_inputs_keep_an_fp32_state_even_under_autocast():
    inputs = make_inputs(length=64)
    for name in ("x", "B", "C"):
        inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
    expected = value_and_gradients(scan_by_the_paper, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = scan_with()(**inputs)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(state.double(), expected[1], rtol=1e-5, atol=1e-5)
    assert_close(value_and_gradients(scan_with(), inputs), expected, tolerance=1e-2)


def test_without_optional_inputs():
    inputs = make_inputs()
    plain = {k: inputs[k] for k in ("x", "dt", "A", "B", "C")}
    y, state = ssd(**plain)
    assert state is None
    zeros = dict(plain, D=torch.zeros(4), initial_state=torch.zeros(1, 4, 3, 5))
    assert torch.equal(ssd(**zeros)[0], y)
