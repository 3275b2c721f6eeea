"""The Triton convolution against the definition in float64 and against the reference: on a GPU
compiled, elsewhere in Triton's interpreter with programs of a few steps."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton needs Linux")

from test_kernel_causal_conv1d import (
    assert_close,
    convolve_by_definition,
    make_inputs,
    value_and_gradients,
)

from ssm_train.kernels.causal_conv1d import reference, triton


@pytest.fixture
def convolve(kernel_device, monkeypatch):
    """The kernel where it runs. Interpreted, a program has 4 steps and 4 channels."""
    if kernel_device == "cpu":
        monkeypatch.setattr(triton, "CHUNKS", (4, 4))
        monkeypatch.setattr(triton, "CHANNELS", 4)

    def run(**inputs):
        inputs = {k: v.to(kernel_device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        options = {"activation": "silu", "output_final_window": True}
        y, window = triton.causal_conv1d(**options | inputs)
        return y.cpu(), None if window is None else window.cpu()

    return run


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 17, 70])
def test_values_and_gradients_follow_the_definition(convolve, length, width):
    inputs = make_inputs(length=length, width=width)
    assert_close(
        value_and_gradients(convolve, inputs), value_and_gradients(convolve_by_definition, inputs)
    )


@pytest.mark.parametrize("windows", [0, 1, 4])
@pytest.mark.parametrize("boundary", range(1, 9))
def test_documents_are_apart(convolve, boundary, windows):
    """A boundary at every place, a document of one token behind it, and one of none; without
    windows, with one for all, with one for each."""
    offsets = torch.tensor([0, boundary, boundary + 1, boundary + 1, 13], dtype=torch.int32)
    inputs = make_inputs(rows=1, length=13, documents=max(windows, 1))
    if not windows:
        del inputs["initial_window"]
    finals = {"output_final_window": windows > 0}
    found, expected = (
        value_and_gradients(
            lambda op=op, **v: with_empty(op(**v, **finals, cu_seqlens=offsets)), inputs
        )
        for op in (convolve, lambda **v: reference.causal_conv1d(activation="silu", **v))
    )
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def with_empty(result):
    y, window = result
    return y, torch.zeros(1, requires_grad=True) if window is None else window


@pytest.mark.parametrize("poison", [1e30, float("nan")])
def test_nothing_leaks_over_a_boundary(convolve, poison):
    inputs = make_inputs(rows=1, length=20, documents=1)
    del inputs["initial_window"]
    options = {"cu_seqlens": torch.tensor([0, 9, 20]), "output_final_window": False}
    y, _ = convolve(**inputs, **options)
    first_grad = torch.autograd.grad(y[:, 9:].sum(), inputs["x"])[0][:, :9]
    assert first_grad.abs().max() == 0
    poisoned = dict(inputs, x=inputs["x"].detach().clone())
    poisoned["x"][:, :9] = poison
    assert torch.equal(convolve(**poisoned, **options)[0][:, 9:], y[:, 9:])


def test_slices_of_a_projection_and_a_frozen_filter(convolve):
    inputs = make_inputs(length=17)
    wide = torch.randn(2, 17, 12, requires_grad=True)
    frozen = {name: inputs[name].detach() for name in ("weight", "bias")}
    results = []
    for op in (convolve, lambda **v: reference.causal_conv1d(**{"activation": "silu"} | v)):
        y, window = op(x=wide[..., 3:8], **frozen, output_final_window=False)
        assert window is None
        results.append((y, torch.autograd.grad(y.square().sum(), wide)[0]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [True, False])
def test_bf16_is_rounded_once(convolve, activation, biased):
    inputs = make_inputs(length=17)
    x = inputs["x"].detach().bfloat16().requires_grad_()
    options = {"bias": inputs["bias"] if biased else None, "activation": activation}
    found, expected = (
        op(x=x, weight=inputs["weight"], **options, output_final_window=False)[0]
        for op in (convolve, reference.causal_conv1d)
    )
    assert found.dtype == torch.bfloat16
    # Triton's interpreter cuts digits off where a GPU rounds.
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
    pull = torch.randn(found.shape)
    gradients = [
        torch.autograd.grad((y.float() * pull).sum(), (x, inputs["weight"]))
        for y in (found, expected)
    ]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
