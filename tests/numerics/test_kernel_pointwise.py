"""Pointwise operations, plain and in Triton, against their definitions in float64: values and all
gradients. Triton is compiled on a GPU, elsewhere in its interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton needs Linux")

from ssm_train.kernels import pointwise as op
from ssm_train.kernels.pointwise import reference, triton

SHAPES = [(7,), (3, 5), (2, 3, 341), (1, 1024), (5, 1025), (9, 2048), (0, 8)]


@pytest.fixture(params=["reference", "triton"])
def module(request, kernel_device):
    return {"reference": reference, "triton": triton}[request.param]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def define(name: str, first: Tensor, second: Tensor) -> Tensor:
    return first * first.sigmoid() * second if name == "swiglu" else first + second


def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, shape if name == "swiglu" else shape[-1:]]
    dtypes = [dtype, dtype if name == "swiglu" else torch.float32]
    return [
        torch.randn(s, generator=generator).to(d).to(device).requires_grad_()
        for s, d in zip(shapes, dtypes, strict=True)
    ]


def value_and_gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    pull = torch.randn(y.shape, generator=generator).to(y.device)
    gradients = torch.autograd.grad((y * pull.to(y.dtype)).sum(), inputs)
    return [y.detach(), *gradients]


def exact(name: str, inputs: list[Tensor], pull_dtype: torch.dtype) -> list[Tensor]:
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    y = define(name, *doubles)
    generator = torch.Generator().manual_seed(1)
    pull = torch.randn(y.shape, generator=generator).to(y.device).to(pull_dtype)
    return [y.detach(), *torch.autograd.grad((y * pull.double()).sum(), doubles)]


@pytest.mark.parametrize("name", ["swiglu", "add_bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_follow_the_definition(module, kernel_device, name, shape):
    inputs = draw(name, shape, torch.float32, kernel_device)
    y = getattr(module, name)(*inputs)
    for got, wanted in zip(
        value_and_gradients(y, inputs), exact(name, inputs, y.dtype), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["swiglu", "add_bias"])
def test_bf16_has_the_error_of_the_reference(kernel_device, name):
    inputs = draw(name, (33, 341), torch.bfloat16, kernel_device)
    results = [getattr(m, name)(*inputs) for m in (triton, reference)]
    assert results[0].dtype == (torch.bfloat16 if name == "swiglu" else torch.float32)
    expected = exact(name, inputs, results[0].dtype)
    found = [value_and_gradients(y, inputs) for y in results]
    factor = 2.2 if kernel_device == "cpu" else 1.1  # the interpreter cuts digits off
    for got, plain, wanted in zip(*found, expected, strict=True):
        assert got.dtype == plain.dtype
        error, allowed = ((v.double() - wanted).norm() / wanted.norm() for v in (got, plain))
        assert error < factor * allowed + 1e-6


@pytest.mark.parametrize("name", ["swiglu", "add_bias"])
def test_slices_and_nan(module, kernel_device, name):
    """Columns and parts of rows give what their copies give, NaN where one was."""
    first, second = draw(name, (8, 96), torch.float32, kernel_device)
    with torch.no_grad():
        first[3, 40] = torch.nan
        x = first[:, 10:80]
        other = second[:, 10:80] if name == "swiglu" else second[10:80]
        y = getattr(module, name)(x, other)
        expected = getattr(reference, name)(x.clone(), other.clone())
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert int(y.isnan().sum()) == 1 and bool(y[3, 30].isnan())


def test_a_frozen_bias_has_no_sum(kernel_device, monkeypatch):
    x, bias = draw("add_bias", (6, 8), torch.bfloat16, kernel_device)
    y = triton.add_bias(x, bias.detach())
    pull = torch.ones_like(y)
    monkeypatch.setattr(Tensor, "sum_to_size", lambda *_, **__: pytest.fail("a sum"))
    y.backward(pull)
    assert x.grad.dtype == torch.bfloat16 and x.grad.eq(1).all()


@pytest.mark.parametrize("name", ["swiglu", "add_bias"])
def test_gradcheck_in_float64(kernel_device, name):
    """Float64 goes to the reference, also on a GPU."""
    inputs = [
        x.detach().double().requires_grad_() for x in draw(name, (3, 4), torch.float32, "cpu")
    ]
    inputs = [x.to(kernel_device).detach().requires_grad_() for x in inputs]
    torch.autograd.gradcheck(lambda *v: getattr(op, name)(*v), inputs)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_device_chooses(kernel_device, kernels):
    x = torch.zeros(2, device=kernel_device)
    on_gpu = kernel_device == "cuda" and kernels == "auto"
    assert op.choose(kernels, x, x) is (triton if on_gpu else reference)
    assert op.choose(kernels, x, x.double()) is op.choose(kernels, x.double()) is reference


def test_swiglu_is_made_again_to_the_bit(kernel_device):
    gate, up = draw("swiglu", (5, 70), torch.bfloat16, kernel_device)
    y = triton.swiglu(gate, up.float())
    assert y.dtype == torch.float32
    assert torch.equal(y.grad_fn.make_again(y.grad_fn), y)
