"""Causal depthwise convolution in Triton. Each output is computed by itself, in the backward pass
again, so that nothing between x and y is stored. Nothing is tuned at run time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_train.kernels.rows import by_rows

STEPS, CHANNELS, WARPS = 32, 64, 4  # of a program


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_window: Tensor | None = None,
    output_final_window: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `reference.causal_conv1d`. It does not wait for the device."""
    assert activation in (None, "silu"), activation
    silu, before, steps = activation == "silu", weight.shape[1] - 1, x.shape[1]
    if initial_window is None and not output_final_window:
        starts = None if cu_seqlens is None else find_starts(cu_seqlens, steps)
        return _Convolution.apply(x, weight, bias, starts, silu), None
    if initial_window is None:
        initial_window = x.new_zeros(1, x.shape[2], before)
    initial_window = initial_window.to(x.dtype).mT  # [N, W - 1, d]
    if cu_seqlens is None:
        laid = torch.cat([initial_window.expand(len(x), -1, -1), x], 1)
        y = _Convolution.apply(laid, weight, bias, None, silu)[:, before:]
        return y, laid[:, steps:].mT if output_final_window else None
    laid, offsets, places = lay_behind_windows(x, initial_window, cu_seqlens)
    y = _Convolution.apply(laid, weight, bias, find_starts(offsets, laid.shape[1]), silu)
    y = y.index_select(1, places)
    if not output_final_window:
        return y, None
    last = offsets[1:, None] - before + torch.arange(before, device=x.device)
    return y, laid[0, last].mT


def find_starts(cu_seqlens: Tensor, steps: int) -> Tensor:
    """The first step of each step's document, [T] int32."""
    t = torch.arange(steps, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return cu_seqlens[torch.searchsorted(cu_seqlens, t, right=True) - 1].int()


def lay_behind_windows(
    x: Tensor, windows: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Documents of x [1, T, d], each behind its window [N or 1, W - 1, d], in one row: the row, its
    offsets [N + 1], and the places of x's steps [T]."""
    documents, before = cu_seqlens.numel() - 1, windows.shape[1]
    numbers = torch.arange(documents + 1, device=x.device)
    offsets = cu_seqlens + before * numbers
    t = torch.arange(x.shape[1], device=x.device)
    places = t + before * torch.searchsorted(cu_seqlens.to(t.dtype), t, right=True)
    window_places = offsets[:-1, None] + torch.arange(before, device=x.device)
    laid = x.new_zeros(1, x.shape[1] + documents * before, x.shape[2]).index_copy(1, places, x)
    windows = windows.expand(documents, -1, -1).flatten(0, 1)[None]
    return laid.index_copy(1, window_places.flatten(), windows), offsets, places


class _Convolution(torch.autograd.Function):
    """x [B, T, d], weight [d, W], bias [d] or None, starts [T] or None -> y [B, T, d]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, silu: bool
    ) -> Tensor:
        x, weight = by_rows(x), weight.contiguous()
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        _outputs[grid_of(x)](
            x, x.stride(1), weight, bias, starts, y, x.shape[1], x.shape[2],
            **sizes_of(weight, silu),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, starts)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, starts = ctx.saved_tensors
        grid = grid_of(x)
        programs = grid[1] * grid[2]  # along time: each has a share of a channel's sums
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = x.new_empty((programs, *weight.mT.shape), dtype=torch.float32)
        if ctx.needs_input_grad[2]:
            grad_bias = x.new_empty((programs, len(weight)), dtype=torch.float32)
        _gradients[grid](
            x, x.stride(1), weight, bias, starts, grad_y.contiguous(), grad_x, grad_weight,
            grad_bias, x.shape[1], x.shape[2], **sizes_of(weight, ctx.silu),
        )  # fmt: skip
        if grad_weight is not None:
            grad_weight = grad_weight.sum(0).mT.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.sum(0).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def grid_of(x: Tensor) -> tuple[int, int, int]:
    return triton.cdiv(x.shape[2], CHANNELS), triton.cdiv(x.shape[1], STEPS), len(x)


def sizes_of(weight: Tensor, silu: bool) -> dict[str, Any]:
    return {
        "WIDTH": weight.shape[1],
        "SILU": silu,
        "STEPS": STEPS,
        "CHANNELS": CHANNELS,
        "num_warps": WARPS,
    }


# ---------------------------------------------------------------- kernels
#
# A program has some steps of a row and some channels, [T, D]. `first` is the row's first step,
# counted over the batch.


@triton.jit
def _sum_taps(x, stride, weight, bias, starts, first, t, d, steps, channels, WIDTH: tl.constexpr):
    """The convolution [T, D] at steps t, and the first step of their documents; 0 outside."""
    start = 0 * t
    if starts is not None:
        start = tl.load(starts + t, mask=t < steps, other=0)
    total = tl.zeros([t.shape[0], d.shape[0]], tl.float32)
    if bias is not None:
        total += tl.load(bias + d, mask=d < channels, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(WIDTH):
        source = t - (WIDTH - 1 - j)
        mask = ((t < steps) & (source >= start))[:, None] & (d < channels)[None, :]
        value = tl.load(x + (first + source)[:, None] * stride + d[None, :], mask=mask, other=0.0)
        tap = tl.load(weight + d * WIDTH + j, mask=d < channels, other=0.0)
        total += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    return total, start


@triton.jit
def _outputs(
    x, stride, weight, bias, starts, y, steps, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(2).to(tl.int64) * steps
    t = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total, _ = _sum_taps(x, stride, weight, bias, starts, first, t, d, steps, channels, WIDTH)
    if SILU:
        total = total / (1 + tl.exp(-total))
    mask = (t < steps)[:, None] & (d < channels)[None, :]
    tl.store(y + (first + t)[:, None] * channels + d[None, :], total, mask=mask)


@triton.jit
def _gradients(
    x, stride, weight, bias, starts, grad_y, grad_x, grad_weight, grad_bias, steps, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(2).to(tl.int64) * steps
    t = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    share = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    by_x = tl.zeros([STEPS, CHANNELS], tl.float32)
    for ahead in tl.static_range(WIDTH):  # x_t is a part of y_t, ..., y_{t + W - 1}
        later = t + ahead
        total, start = _sum_taps(
            x, stride, weight, bias, starts, first, later, d, steps, channels, WIDTH
        )
        mask = (later < steps)[:, None] & (d < channels)[None, :]
        at = grad_y + (first + later)[:, None] * channels + d[None, :]
        gradient = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            s = 1 / (1 + tl.exp(-total))
            gradient *= s * (1 + total * (1 - s))
        tap = tl.load(weight + d * WIDTH + (WIDTH - 1 - ahead), mask=d < channels, other=0.0)
        by_x += tl.where((start <= t)[:, None], gradient * tap.to(tl.float32)[None, :], 0.0)
        if ahead == 0:
            if grad_bias is not None:
                at_share = grad_bias + share * channels + d
                tl.store(at_share, tl.sum(gradient, 0), mask=d < channels)
            if grad_weight is not None:
                for j in tl.static_range(WIDTH):
                    source = t - (WIDTH - 1 - j)
                    seen = (source >= start)[:, None] & mask
                    place = x + (first + source)[:, None] * stride + d[None, :]
                    value = tl.load(place, mask=seen, other=0.0).to(tl.float32)
                    at_share = grad_weight + (share * WIDTH + j) * channels + d
                    tl.store(at_share, tl.sum(gradient * value, 0), mask=d < channels)
    mask = (t < steps)[:, None] & (d < channels)[None, :]
    tl.store(grad_x + (first + t)[:, None] * channels + d[None, :], by_x, mask=mask)
