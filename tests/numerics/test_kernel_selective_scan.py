"""selective_scan against transformers' scan, a float64 loop of the paper's equation, gradcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gradients import value_and_gradients
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from ssm_train.kernels.selective_scan import reference, selective_scan

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "initial_state")


@pytest.fixture(params=[1, 3, 2**18], ids=["1-step blocks", "few-step blocks", "one block"])
def any_block(request, monkeypatch):
    """Results may not depend on where blocks end; sizes are in steps of 2 rows x 5 x 3."""
    steps = request.param if request.param < 2**10 else 2**10
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", steps * 30)


def make_inputs(
    rows=2, length=37, channels=5, states=3, documents=None, dtype=torch.float32, per_channel=""
):
    """`per_channel`: which of B and C every channel has its own of."""
    torch.manual_seed(length)
    shape = (rows, length, channels)

    def make_matrix(name):
        return torch.randn(rows, length, *([channels] if name in per_channel else []), states)

    values = {
        "u": torch.randn(shape),
        "dt": F.softplus(torch.randn(shape)),
        "A": -torch.rand(channels, states) * 4,
        "B": make_matrix("B"),
        "C": make_matrix("C"),
        "D": torch.randn(channels),
        "z": torch.randn(shape),
        "initial_state": torch.randn(documents or rows, channels, states),
    }
    return {name: v.to(dtype).requires_grad_() for name, v in values.items()}


def scan_by_the_paper(u, dt, A, B, C, D, z, initial_state) -> tuple[Tensor, Tensor]:
    """Algorithm 2 of arXiv 2312.00752, a step at a time, in float64."""
    u, dt, A, B, C, D, z, h = (v.double() for v in (u, dt, A, B, C, D, z, initial_state))
    B, C = (v.unsqueeze(2) if v.ndim == 3 else v for v in (B, C))  # [B, T, 1 or d, n]
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t]
        outputs.append(((h * C[:, t]).sum(-1) + D * u[:, t]) * F.silu(z[:, t]))
    return torch.stack(outputs, 1), h


def scan(**inputs):
    return selective_scan(**inputs, output_final_state=True)


def assert_close(actual, expected, tolerance=1e-5):
    for name, a, e in zip(("y", "state", *NAMES), actual, expected, strict=False):
        scale = e.double().abs().max().clamp(min=1)
        error = ((a.double() - e.double()).abs().max() / scale).item()
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("per_channel", ["", "B", "C", "BC"])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_values_and_gradients_follow_the_paper(length, per_channel, any_block):
    inputs = make_inputs(length=length, per_channel=per_channel)
    assert_close(value_and_gradients(scan, inputs), value_and_gradients(scan_by_the_paper, inputs))


def test_agrees_with_transformers():
    inputs = make_inputs(rows=3, length=53, channels=8, states=16)
    del inputs["initial_state"]

    def theirs(u, dt, A, B, C, D, z):
        y, state = mamba_selective_scan(
            u.mT, dt.mT, A, B.mT, C.mT, D=D, z=z.mT, return_last_state=True
        )
        return y.mT, state

    assert_close(value_and_gradients(scan, inputs), value_and_gradients(theirs, inputs))


@pytest.mark.parametrize("per_channel", ["", "BC"])
def test_gradcheck(per_channel, any_block):
    inputs = make_inputs(
        length=7, channels=2, states=3, dtype=torch.float64, per_channel=per_channel
    )
    torch.autograd.gradcheck(
        lambda *v: scan(**dict(zip(inputs, v, strict=True))), tuple(inputs.values())
    )


@pytest.mark.parametrize("trained", ["u", "A", "initial_state"])
def test_gradient_of_one_input_alone(trained):
    inputs = make_inputs()
    expected = dict(zip(NAMES, value_and_gradients(scan, inputs)[2:], strict=True))
    alone = {k: v if k == trained else v.detach() for k, v in inputs.items()}
    y, state = scan(**alone)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, alone[trained])[0], expected[trained])


@pytest.mark.parametrize("per_channel", ["", "BC"])
@pytest.mark.parametrize("offset", range(1, 11))
def test_packed_documents_equal_separate_ones(offset, per_channel, any_block):
    """A boundary at every offset, and a one-token document behind it."""
    inputs = make_inputs(rows=1, length=12, documents=3, per_channel=per_channel)
    offsets = [0, offset, offset + 1, 12]
    packed = value_and_gradients(
        lambda **v: scan(**v, cu_seqlens=torch.tensor(offsets, dtype=torch.int32)), inputs
    )

    def separate(u, dt, A, B, C, D, z, initial_state):
        parts = [
            scan(
                u=u[:, s:e],
                dt=dt[:, s:e],
                B=B[:, s:e],
                C=C[:, s:e],
                A=A,
                D=D,
                z=z[:, s:e],
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
    cu_seqlens = torch.tensor([0, 9, 20], dtype=torch.int32)
    y, _ = scan(**inputs, cu_seqlens=cu_seqlens)
    first_grad = torch.autograd.grad(y[:, 9:].sum(), inputs["u"])[0][:, :9]
    assert first_grad.abs().max() == 0
    poisoned = dict(inputs, u=inputs["u"].detach().clone())
    poisoned["u"][:, :9] = poison
    assert torch.equal(scan(**poisoned, cu_seqlens=cu_seqlens)[0][:, 9:], y[:, 9:])


def test_shared_initial_state_sums_its_gradients():
    inputs = make_inputs(rows=1, length=12, documents=1)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    shared = value_and_gradients(lambda **v: scan(**v, cu_seqlens=cu_seqlens), inputs)
    h = inputs["initial_state"].detach().repeat(2, 1, 1).requires_grad_()
    copies = value_and_gradients(
        lambda **v: scan(**v, cu_seqlens=cu_seqlens), dict(inputs, initial_state=h)
    )
    assert_close(shared[:-1], copies[:-1])
    torch.testing.assert_close(shared[-1], copies[-1].sum(0, keepdim=True))


@pytest.mark.parametrize("split", [1, 16, 36])
def test_halves_chained_by_their_state_equal_the_whole(split):
    inputs = make_inputs(length=37)
    whole = value_and_gradients(scan, inputs)

    def chained(initial_state, A, D, **timed):
        first = {k: v[:, :split] for k, v in timed.items()}
        second = {k: v[:, split:] for k, v in timed.items()}
        y1, state = scan(**first, A=A, D=D, initial_state=initial_state)
        y2, state = scan(**second, A=A, D=D, initial_state=state)
        return torch.cat([y1, y2], 1), state

    assert_close(value_and_gradients(chained, inputs), whole)


def test_padding_passes_the_state_unchanged():
    inputs = {k: v.detach() for k, v in make_inputs(length=9).items()}
    padded = {
        k: F.pad(v, (0, 0, 4, 3)) if k in ("u", "dt", "B", "C", "z") else v
        for k, v in inputs.items()
    }
    for name in ("u", "B", "C", "z"):  # padding holds garbage everywhere but in dt
        padded[name][:, :4] = padded[name][:, -3:] = 7.0
    y, state = scan(**inputs)
    y_padded, state_padded = scan(**padded)
    assert torch.equal(y_padded[:, 4:-3], y) and torch.equal(state_padded, state)


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_extreme_decays_stay_exact(scale):
    """No exponent of a positive number anywhere: from no decay at all to instant forgetting."""
    inputs = make_inputs(length=64)
    inputs["dt"] = (inputs["dt"].detach() * scale).requires_grad_()
    actual = value_and_gradients(scan, inputs)
    assert all(v.isfinite().all() for v in actual)
    assert_close(actual, value_and_gradients(scan_by_the_paper, inputs))


@pytest.mark.parametrize("per_channel", ["", "BC"])
def test_bf16_inputs_keep_an_fp32_state_even_under_autocast(per_channel):
    inputs = make_inputs(length=64, per_channel=per_channel)
    for name in ("u", "B", "C", "z"):
        inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
    expected = value_and_gradients(scan_by_the_paper, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_gradients(scan, inputs)
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
    assert actual[3].dtype == torch.float32
    assert_close(actual[1:2], expected[1:2])  # the state is not rounded ...
    assert_close(actual, expected, tolerance=1e-2)  # ... only what leaves in bf16


def test_without_optional_inputs():
    inputs = make_inputs()
    plain = {k: inputs[k] for k in ("u", "dt", "A", "B", "C")}
    y, state = selective_scan(**plain)
    assert state is None
    zeros = dict(plain, D=torch.zeros(5), initial_state=torch.zeros(1, 5, 3))
    assert torch.equal(selective_scan(**zeros)[0], y)
