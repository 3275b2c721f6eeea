"""RMSNorm in Triton: a program norms a few rows, and backwards adds up its share of the weight's
gradient. Nothing is tuned at run time, and another number of rows compiles nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ELEMENTS = 2048  # of a program at a time, or one row; 16 for a thread
PROGRAMS = 528  # backwards, that share the rows where the weight is trained: 4 on each of 132 SMs


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `reference.rms_norm`."""
    assert residual is None or residual.shape == x.shape, (residual, x.shape)
    y, total = _Norm.apply(x, residual, None, weight, eps, x.shape[-1], None, dtype or x.dtype)
    return y if residual is None else (y, total)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    gate_first: bool = False,
    group_size: int | None = None,
) -> Tensor:
    """See `reference.gated_rms_norm`."""
    assert gate.shape == x.shape, (gate.shape, x.shape)
    order = "first" if gate_first else "last"
    return _Norm.apply(x, None, gate, weight, eps, group_size or x.shape[-1], order, x.dtype)[0]


class _Norm(torch.autograd.Function):
    """x, residual or None, gate or None [..., D], weight [D] or None -> y, total or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gate: Tensor | None,
        weight: Tensor | None,
        eps: float,
        group_size: int,
        gate_order: str | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        rest = x.shape[-1] % group_size
        assert rest == 0 and (weight is None or weight.shape == x.shape[-1:]), (x.shape, group_size)
        weight = None if weight is None else weight.contiguous()
        rows = [None if v is None else as_rows(v) for v in (x, residual, gate)]
        total = None
        if residual is not None:
            total = torch.empty_like(residual, memory_format=torch.contiguous_format)
        ctx.sizes = sizes_of(group_size) | {"GATE": gate_order}
        ctx.shape, ctx.dtype, ctx.dtype_of_y = x.shape, x.dtype, dtype
        y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        count, groups = x.numel() // x.shape[-1], x.shape[-1] // group_size
        rstd = x.new_empty((count, groups), dtype=torch.float32)
        norm_rows(rows, weight, rstd, y, total=total, eps=eps, **ctx.sizes)
        if total is not None and total.dtype == torch.float32:  # not rounded, and kept anyway
            rows[:2] = total, None  # itself: a view of an output would keep its own graph alive
        ctx.save_for_backward(*rows, weight, rstd)
        ctx.make_again = make_again
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, residual, gate, weight, rstd = ctx.saved_tensors
        x = as_rows(x)
        grad_y = torch.zeros_like(x) if grad_y is None else as_rows(grad_y)
        grad_total = None if grad_total is None else as_rows(grad_total)
        grad_x = x.new_empty(ctx.shape, dtype=ctx.dtype)
        grad_gate = None if gate is None else gate.new_empty(ctx.shape)
        grad_residual = None  # it is x's, unless it is rounded to another dtype
        if ctx.residual_dtype not in (None, ctx.dtype):
            grad_residual = x.new_empty(ctx.shape, dtype=ctx.residual_dtype)
        count, groups = rstd.shape
        programs = triton.cdiv(count, ctx.sizes["ROWS"])
        grad_weight = None
        if ctx.needs_input_grad[3]:
            programs = min(programs, triton.cdiv(PROGRAMS, groups))
            grad_weight = x.new_empty((programs, x.shape[1]), dtype=torch.float32)
        _gradients[programs, groups](
            *with_strides([x, residual, gate, grad_y, grad_total]), weight, rstd,
            grad_x, grad_residual, grad_gate, grad_weight, count, **ctx.sizes,
        )  # fmt: skip
        if ctx.residual_dtype == ctx.dtype:
            grad_residual = grad_x
        if grad_weight is not None:
            grad_weight = grad_weight.sum(0).to(weight.dtype)
        return grad_x, grad_residual, grad_gate, grad_weight, None, None, None, None


def make_again(ctx: Any) -> Tensor:
    """See `again.made_again`."""
    x, residual, gate, weight, rstd = ctx.saved_tensors
    y: Tensor = x.new_empty(ctx.shape, dtype=ctx.dtype_of_y)
    norm_rows([as_rows(x), residual, gate], weight, rstd, y, **ctx.sizes)
    return y


def norm_rows(
    rows: list[Tensor | None],
    weight: Tensor | None,
    rstd: Tensor,
    y: Tensor,
    *,
    total: Tensor | None = None,
    eps: float | None = None,
    **sizes: Any,
) -> None:
    """Fills y and `total` from x, residual and gate, each [rows, D] or None. `rstd` [rows, groups],
    1 / sqrt(mean + eps), is filled too, or, without eps, read: then y has the bits of that time."""
    _outputs[triton.cdiv(len(rstd), sizes["ROWS"]), rstd.shape[1]](
        *with_strides(rows), weight, y, total, rstd, len(rstd), eps, **sizes
    )


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D], rows dense and one stride apart; slices of a projection are that
    without a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def with_strides(rows: list[Tensor | None]) -> list[Any]:
    """Each of them, and how far its rows are apart."""
    return [part for v in rows for part in (v, 0 if v is None else v.stride(0))]


def sizes_of(group_size: int) -> dict[str, Any]:
    columns = triton.next_power_of_2(group_size)
    rows = max(1, ELEMENTS // columns)
    return {
        "SIZE": group_size,
        "COLUMNS": columns,
        "ROWS": rows,
        "num_warps": min(32, max(1, rows * columns // 512)),
    }


# ---------------------------------------------------------------- kernels
#
# A program has some rows and one group of SIZE channels, [R, C]; what is not there is 0. Outputs
# are dense. Numbers of rows are not specialized: that of one token would be a kernel of its own.


@triton.jit
def _load(rows, stride, row, d, mask):
    at = rows + row[:, None] * stride + d[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def _outputs(
    x, x_stride, residual, residual_stride, gate, gate_stride, weight, y, total, rstd, count, eps,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    group, groups = tl.program_id(1), tl.num_programs(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    d = group * SIZE + column
    mask = (row < count)[:, None] & (column < SIZE)[None, :]
    place = row[:, None] * (groups * SIZE) + d[None, :]

    value = _load(x, x_stride, row, d, mask)
    if residual is not None:
        value += _load(residual, residual_stride, row, d, mask)
    if total is not None:
        tl.store(total + place, value, mask=mask)
    if GATE is not None:
        opened = _load(gate, gate_stride, row, d, mask)
        opened *= tl.sigmoid(opened)
    if GATE == "first":
        value *= opened
    if eps is None:
        scale = tl.load(rstd + row * groups + group, mask=row < count, other=0.0)
    else:
        scale = 1 / tl.sqrt(tl.sum(value * value, 1) / SIZE + eps)
        tl.store(rstd + row * groups + group, scale, mask=row < count)
    value *= scale[:, None]
    if weight is not None:
        value *= tl.load(weight + d, mask=column < SIZE, other=0.0).to(tl.float32)[None, :]
    if GATE == "last":
        value *= opened
    tl.store(y + place, value, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _gradients(
    x, x_stride, residual, residual_stride, gate, gate_stride, grad_y, grad_y_stride, grad_total,
    grad_total_stride, weight, rstd, grad_x, grad_residual, grad_gate, grad_weight, count,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    share, shares = tl.program_id(0), tl.num_programs(0)
    group, groups = tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, COLUMNS)
    d = group * SIZE + column
    if weight is not None:
        factor = tl.load(weight + d, mask=column < SIZE, other=0.0).to(tl.float32)[None, :]
    by_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(share * ROWS, count, shares * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < count)[:, None] & (column < SIZE)[None, :]
        place = row[:, None] * (groups * SIZE) + d[None, :]
        scale = tl.load(rstd + row * groups + group, mask=row < count, other=0.0)[:, None]
        value = _load(x, x_stride, row, d, mask)
        normed = value
        if residual is not None:
            normed += _load(residual, residual_stride, row, d, mask)
        if GATE is not None:
            opened = _load(gate, gate_stride, row, d, mask)
            s = tl.sigmoid(opened)
            slope = s * (1 + opened * (1 - s))
            opened *= s
        if GATE == "first":
            normed *= opened
        normed *= scale

        gradient = _load(grad_y, grad_y_stride, row, d, mask)  # by y, then by what is before it
        if GATE == "last":
            by_gate = gradient * normed * slope
            if weight is not None:
                by_gate *= factor
            gradient *= opened
        if grad_weight is not None:
            by_weight += gradient * normed
        if weight is not None:
            gradient *= factor
        along = tl.sum(gradient * normed, 1) / SIZE
        gradient = scale * (gradient - normed * along[:, None])
        if grad_total is not None:
            gradient += _load(grad_total, grad_total_stride, row, d, mask)
        if GATE == "first":
            by_gate = gradient * value * slope
            gradient *= opened
        if GATE is not None:
            tl.store(grad_gate + place, by_gate, mask=mask)
        tl.store(grad_x + place, gradient, mask=mask)
        if grad_residual is not None:
            tl.store(grad_residual + place, gradient, mask=mask)
    if grad_weight is not None:
        at_share = grad_weight + share * (groups * SIZE) + d
        tl.store(at_share, tl.sum(by_weight, 0), mask=column < SIZE)
