"""causal_conv1d against transformers' convolution, a float64 sum over taps, and gradcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gradients import value_and_gradients
from torch import Tensor
from transformers.models.mamba.modeling_mamba import causal_conv1d_fn

from ssm_train.kernels.causal_conv1d import causal_conv1d

NAMES = ("x", "weight", "bias", "initial_window")


def make_inputs(rows=2, length=17, channels=5, width=4, documents=None, dtype=torch.float32):
    torch.manual_seed(length)
    values = {
        "x": torch.randn(rows, length, channels),
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels),
        "initial_window": torch.randn(documents or rows, channels, width - 1),
    }
    return {name: v.to(dtype).requires_grad_() for name, v in values.items()}


def convolve_by_definition(x, weight, bias, initial_window) -> tuple[Tensor, Tensor]:
    x, weight, bias, window = (v.double() for v in (x, weight, bias, initial_window))
    outputs = []
    for t in range(x.shape[1]):
        seen = torch.cat([window, x[:, t, :, None]], 2)  # [B, d, W]
        outputs.append(F.silu(bias + (seen * weight).sum(2)))
        window = seen[:, :, 1:]
    return torch.stack(outputs, 1), window


def convolve(**inputs):
    return causal_conv1d(**inputs, activation="silu", output_final_window=True)


def assert_close(actual, expected, tolerance=1e-5):
    for name, a, e in zip(("y", "window", *NAMES), actual, expected, strict=True):
        assert a.shape == e.shape, name
        scale = max([e.double().abs().max().item()] if e.numel() else [0.0, 1.0])
        error = (a.double() - e.double()).abs().max().item() / max(scale, 1) if e.numel() else 0
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_values_and_gradients_follow_the_definition(length, width):
    inputs = make_inputs(length=length, width=width)
    assert_close(
        value_and_gradients(convolve, inputs), value_and_gradients(convolve_by_definition, inputs)
    )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [True, False])
def test_agrees_with_transformers(activation, biased):
    inputs = make_inputs(length=33)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"] if biased else None
    y, window = causal_conv1d(x, weight, bias, activation=activation)
    expected = causal_conv1d_fn(x.mT, weight, bias, activation).mT
    assert window is None
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad((y * y.cos()).sum(), (x, weight)),
        torch.autograd.grad((expected * expected.cos()).sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_gradcheck():
    inputs = make_inputs(length=5, channels=2, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda *v: convolve(**dict(zip(inputs, v, strict=True))), tuple(inputs.values())
    )


@pytest.mark.parametrize("offset", range(1, 11))
def test_packed_documents_equal_separate_ones(offset):
    """A boundary at every offset, and a one-token document, shorter than the window, behind it."""
    inputs = make_inputs(rows=1, length=12, documents=3)
    offsets = [0, offset, offset + 1, 12]

    def separate(x, weight, bias, initial_window):
        parts = [
            convolve(
                x=x[:, s:e], weight=weight, bias=bias, initial_window=initial_window[i : i + 1]
            )
            for i, (s, e) in enumerate(zip(offsets[:-1], offsets[1:], strict=True))
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([window for _, window in parts])

    packed = value_and_gradients(
        lambda **v: convolve(**v, cu_seqlens=torch.tensor(offsets, dtype=torch.int32)), inputs
    )
    assert_close(packed, value_and_gradients(separate, inputs), tolerance=1e-6)


@pytest.mark.parametrize("poison", [1e30, float("nan")])
def test_nothing_leaks_over_a_boundary(poison):
    """The second document is bitwise the same whatever the first holds, and so its gradient."""
    inputs = make_inputs(rows=1, length=20, documents=1)
    cu_seqlens = torch.tensor([0, 9, 20], dtype=torch.int32)
    y, _ = convolve(**inputs, cu_seqlens=cu_seqlens)
    first_grad = torch.autograd.grad(y[:, 9:].sum(), inputs["x"])[0][:, :9]
    assert first_grad.abs().max() == 0
    poisoned = dict(inputs, x=inputs["x"].detach().clone())
    poisoned["x"][:, :9] = poison
    assert torch.equal(convolve(**poisoned, cu_seqlens=cu_seqlens)[0][:, 9:], y[:, 9:])


def test_shared_initial_window_sums_its_gradients():
    inputs = make_inputs(rows=1, length=12, documents=1)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    shared = value_and_gradients(lambda **v: convolve(**v, cu_seqlens=cu_seqlens), inputs)
    window = inputs["initial_window"].detach().repeat(2, 1, 1).requires_grad_()
    copies = value_and_gradients(
        lambda **v: convolve(**v, cu_seqlens=cu_seqlens), dict(inputs, initial_window=window)
    )
    assert_close(shared, copies[:-1] + [copies[-1].sum(0, keepdim=True)])


@pytest.mark.parametrize("split", [1, 2, 8, 16])
def test_halves_chained_by_their_window_equal_the_whole(split):
    inputs = make_inputs(length=17)

    def chained(x, weight, bias, initial_window):
        shared = {"weight": weight, "bias": bias}
        y1, window = convolve(x=x[:, :split], initial_window=initial_window, **shared)
        y2, window = convolve(x=x[:, split:], initial_window=window, **shared)
        return torch.cat([y1, y2], 1), window

    assert_close(value_and_gradients(chained, inputs), value_and_gradients(convolve, inputs))


def test_no_window_means_zeros():
    inputs = make_inputs()
    given = dict(inputs, initial_window=torch.zeros(1, 5, 3))
    del inputs["initial_window"]
    for ours, zeros in zip(convolve(**inputs), convolve(**given), strict=True):
        assert torch.equal(ours, zeros)
    short = dict(inputs, x=inputs["x"][:, :2])
    window = convolve(**short)[1]
    assert torch.equal(window[:, :, 0], torch.zeros(2, 5))
    assert torch.equal(window[:, :, 1:], short["x"].mT)


def test_bf16_rounds_once_even_under_autocast():
    inputs = {k: v.detach().bfloat16().requires_grad_() for k, v in make_inputs().items()}
    expected = value_and_gradients(convolve_by_definition, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y, window = convolve(**inputs)
    assert y.dtype == window.dtype == torch.bfloat16
    assert torch.equal(window.double(), expected[1])
    error = (y.double() - expected[0]).abs() / expected[0].abs().clamp(min=1e-6)
    assert error.max() < 2**-8 * 1.01  # half a unit of the last place
