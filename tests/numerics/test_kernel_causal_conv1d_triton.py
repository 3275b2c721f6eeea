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
    """The kernel where it runs. Interpreted, a program has 8 steps, two groups, and 8 channels; on
    a GPU, with so few of them, 16 steps."""
    if kernel_device == "cpu":
        monkeypatch.setattr(triton, "CHUNKS", (8, 8))
        monkeypatch.setattr(triton, "CHANNELS", 8)

    def run(**inputs):
        inputs = {k: v.to(kernel_device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        options = {"activation": "silu", "output_final_window": True}
        y, window = triton.causal_conv1d(**options | inputs)
        return y.cpu(), None if window is None else window.cpu()

    return run


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 19])
def test_values_and_gradients_follow_the_definition(convolve, length, width):
    inputs = make_inputs(length=length, width=width)
    assert_close(
        value_and_gradients(convolve, inputs), value_and_gradients(convolve_by_definition, inputs)
    )


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("packed", [True, False])
def test_it_is_made_again_to_the_bit(convolve, kernel_device, packed, activation):
    inputs = make_inputs(rows=1, length=13)
    x, weight, bias = (inputs[name].to(kernel_device) for name in ("x", "weight", "bias"))
    offsets = torch.tensor([0, 5, 13], dtype=torch.int32, device=kernel_device)
    y, _ = triton.causal_conv1d(
        x, weight, bias, activation=activation, cu_seqlens=offsets if packed else None
    )
    assert torch.equal(y.grad_fn.make_again(y.grad_fn), y)


@pytest.mark.parametrize("windows", [0, 1, 4])
@pytest.mark.parametrize("boundary", [1, 4, 8])
def test_documents_are_apart(convolve, boundary, windows):
    """Some boundary, a document of one token behind it, and one of none; without
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


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 3, 9])
def test_a_document_starts_at_every_place_of_a_chunk(convolve, kernel_device, size, width):
    """Of odd lengths in chunks of a power of two; one of 9 has groups of its own."""
    length = {1: 10, 3: 25, 9: 73}[size] * (1 if kernel_device == "cpu" else 2)
    offsets = torch.tensor([*range(0, length, size), length])
    inputs = make_inputs(rows=1, length=length, width=width)
    del inputs["initial_window"]
    options = {"activation": "silu", "output_final_window": False, "cu_seqlens": offsets}
    found, expected = (
        value_and_gradients(lambda op=op, **v: with_empty(op(**v, **options)), inputs)
        for op in (convolve, reference.causal_conv1d)
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
    gradient = torch.autograd.grad(y[:, 9:].sum(), inputs["x"])[0]
    assert gradient[:, :9].abs().max() == 0
    x = inputs["x"].detach().clone()
    x[:, :9] = poison
    x.requires_grad_()
    found, _ = convolve(**inputs | {"x": x}, **options)
    assert torch.equal(found[:, 9:], y[:, 9:])
    assert torch.equal(torch.autograd.grad(found[:, 9:].sum(), x)[0][:, 9:], gradient[:, 9:])


def test_slices_of_a_projection_and_a_frozen_filter(convolve):
    inputs = make_inputs(length=17, channels=11)
    wide = torch.randn(2, 17, 24, requires_grad=True)
    frozen = {name: inputs[name].detach() for name in ("weight", "bias")}
    results = []
    for op in (convolve, lambda **v: reference.causal_conv1d(**{"activation": "silu"} | v)):
        y, window = op(x=wide[..., 3:14], **frozen, output_final_window=False)
        assert window is None
        results.append((y, torch.autograd.grad(y.square().sum(), wide)[0]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [True, False])
def test_bf16_is_rounded_once(convolve, activation, biased):
    inputs = make_inputs(rows=1, length=17)
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
