"""Pointwise operations in Triton: each element is read and written once. Nothing is tuned at
run time, and another number of rows compiles nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, BLOCK = 4, 512  # rows of a program, and channels of each


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`; computed in fp32 and rounded once."""
    assert gate.shape == up.shape, (gate.shape, up.shape)
    result: Tensor = _SwiGlu.apply(gate.contiguous(), up.contiguous())
    return result


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """See `reference.add_bias`."""
    assert bias.shape == x.shape[-1:], (x.shape, bias.shape)
    result: Tensor = _AddBias.apply(x.contiguous(), bias.contiguous())
    return result


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.make_again = lambda ctx: multiply(*ctx.saved_tensors)
        return multiply(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        launch(_swiglu_gradients, gate, up, grad_y.contiguous(), grad_gate, grad_up)
        return grad_gate, grad_up


def multiply(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, up.dtype))
    launch(_swiglu, gate, up, y)
    return y


def launch(kernel: Any, x: Tensor, *others: Tensor) -> None:
    """A kernel over rows of the shape of x [..., D], all of them dense."""
    width = x.shape[-1]
    count = x.numel() // max(1, width)
    grid = triton.cdiv(count, ROWS), triton.cdiv(width, BLOCK)
    kernel[grid](x, *others, count, width, ROWS=ROWS, BLOCK=BLOCK)


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        y = torch.empty_like(x, dtype=torch.float32)
        launch(_add_bias, x, bias, y)
        ctx.dtypes = x.dtype, bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        needs_x, needs_bias = ctx.needs_input_grad
        dtype, bias_dtype = ctx.dtypes
        grad_x = grad_y.to(dtype) if needs_x else None
        grad_bias = grad_y.sum_to_size(grad_y.shape[-1:]).to(bias_dtype) if needs_bias else None
        return grad_x, grad_bias


# ---------------------------------------------------------------- kernels
#
# A program has a tile of [R, C] elements. Where the width is a multiple of 16, which Triton asks
# itself, a thread reads sixteen bytes at a time; the number of rows says nothing of that.


@triton.jit
def _tile(count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Where its elements are, which of them exist, and their columns."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < count)[:, None] & (column < width)[None, :]
    return row[:, None] * width + column[None, :], mask, column


@triton.jit(do_not_specialize=["count"])
def _swiglu(gate, up, y, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at, mask, _ = _tile(count, width, ROWS, BLOCK)
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, g * tl.sigmoid(g) * u, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _swiglu_gradients(
    gate, up, grad_y, grad_gate, grad_up, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    at, mask, _ = _tile(count, width, ROWS, BLOCK)
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(grad_gate + at, gradient * u * s * (1 + g * (1 - s)), mask=mask)
    tl.store(grad_up + at, gradient * g * s, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _add_bias(x, bias, y, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at, mask, column = _tile(count, width, ROWS, BLOCK)
    b = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, value + b[None, :], mask=mask)
