"""Causal depthwise convolution in Triton. Programs walk along time, the last inputs in registers;
outputs are computed again in the backward pass, so that only x is kept. Nothing is tuned while
it runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_train.kernels.rows import by_rows

CHANNELS, WARPS = 128, 1  # of a program: four channels a thread, in bf16 8 bytes
CHUNKS = (16, 128)  # steps of a program, least and most
PROGRAMS = 2048  # that fill a GPU; fewer, and chunks get shorter
GROUP = 4  # steps whose inputs are loaded at a time; chunks are multiples of it


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
    if before == 0:  # the kernels carry one input at least from step to step
        weight = F.pad(weight, (1, 0))
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
        ctx.save_for_backward(x, weight, bias, starts)
        ctx.silu = silu
        ctx.make_again = lambda ctx: convolve(*ctx.saved_tensors, silu=ctx.silu)
        return convolve(x, weight, bias, starts, silu=silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, starts = ctx.saved_tensors
        grid, chunk = grid_of(x)
        programs = grid[1] * grid[2]  # along time: each has a share of a channel's sums
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = x.new_empty((programs, *weight.mT.shape), dtype=torch.float32)
        if ctx.needs_input_grad[2]:
            grad_bias = x.new_empty((programs, len(weight)), dtype=torch.float32)
        _gradients[grid](
            x, x.stride(1), weight, bias, starts, grad_y.contiguous(), grad_x, grad_weight,
            grad_bias, x.shape[1], x.shape[2], chunk, **sizes_of(weight, ctx.silu),
        )  # fmt: skip
        if grad_weight is not None:
            grad_weight = grad_weight.sum(0).mT.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.sum(0).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, *, silu: bool
) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid, chunk = grid_of(x)
    _outputs[grid](
        x, x.stride(1), weight, bias, starts, y, x.shape[1], x.shape[2], chunk,
        **sizes_of(weight, silu),
    )  # fmt: skip
    return y


def grid_of(x: Tensor) -> tuple[tuple[int, int, int], int]:
    """The grid, and the steps of a chunk."""
    blocks, chunk = triton.cdiv(x.shape[2], CHANNELS), CHUNKS[1]
    while chunk > CHUNKS[0] and len(x) * blocks * triton.cdiv(x.shape[1], chunk) < PROGRAMS:
        chunk //= 2
    return (blocks, triton.cdiv(x.shape[1], chunk), len(x)), chunk


def sizes_of(weight: Tensor, silu: bool) -> dict[str, Any]:
    width = weight.shape[1]
    return {
        "WIDTH": width,
        "SILU": silu,
        "CHANNELS": CHANNELS,
        "GROUP": max(GROUP, triton.next_power_of_2(width - 1)),
        "num_warps": WARPS,
    }


# ---------------------------------------------------------------- kernels
#
# A program has some channels [D] of a chunk of a row and takes GROUP steps after the other, with
# the last inputs in registers. `first` is the row's first step, counted over the batch; `t` is a
# step of the row. Most groups are within one document: only others are CHECKED, at each tap. A mask
# takes a scalar condition as a bound, for which Triton's interpreter has the right type.


@triton.jit
def _only_if(condition, bound):
    """A bound that nothing is below unless the scalar condition holds."""
    return tl.where(condition, bound, 0)


@triton.jit
def _place(steps, chunk, CHANNELS: tl.constexpr):
    """The row's first step, the first and the end of this program's steps, and its channels."""
    first = tl.program_id(2).to(tl.int64) * steps
    begin = tl.program_id(1) * chunk
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    return first, begin, tl.minimum(begin + chunk, steps), d


@triton.jit
def _load_filter(weight, bias, d, channels, WIDTH: tl.constexpr):
    taps = ()
    for j in tl.static_range(WIDTH):
        tap = tl.load(weight + d * WIDTH + j, mask=d < channels, other=0.0)
        taps += (tap.to(tl.float32),)
    shift = tl.zeros(d.shape, tl.float32)
    if bias is not None:
        shift += tl.load(bias + d, mask=d < channels, other=0.0).to(tl.float32)
    return taps, shift


@triton.jit
def _load_before(x, stride, first, begin, d, channels, WIDTH: tl.constexpr):
    """The inputs that the first step of a chunk needs from the steps before; 0 before the row."""
    history = ()
    for j in tl.static_range(WIDTH - 1):
        t = begin - (WIDTH - 1 - j)
        mask = d < _only_if(t >= 0, channels)
        row = tl.load(x + (first + t) * stride + d, mask=mask, other=0.0)
        history += (row.to(tl.float32),)
    return history


@triton.jit
def _load_group(x, stride, first, t, d, steps, channels, GROUP: tl.constexpr):
    """As stored; 0 after the row."""
    at = x + (first + t) * stride
    left = steps - t
    rows = ()
    for k in tl.static_range(GROUP):
        mask = d < _only_if(left > k, channels)
        rows += (tl.load(at + (k * stride + d), mask=mask, other=0.0),)
    return rows


@triton.jit
def _find_start(starts, t, steps):
    """The first step of t's document; the end of a row is the start of another."""
    if starts is None:
        return tl.where(t < steps, 0, steps)
    else:
        return tl.load(starts + t, mask=t < steps, other=steps)


@triton.jit
def _sum_taps(history, x, taps, shift, t, start, WIDTH: tl.constexpr, CHECKED: tl.constexpr):
    """The convolution at step t, its inputs (0 from another document), and the next history."""
    seen = history + (x.to(tl.float32),)
    inputs = ()
    after = ()
    total = shift
    for j in tl.static_range(WIDTH):
        value = seen[j]
        if j > 0:
            after += (value,)
        if CHECKED:
            value = tl.where(t - (WIDTH - 1 - j) >= start, value, 0.0)
        total += value * taps[j]
        inputs += (value,)
    return total, inputs, after


@triton.jit
def _exp_minus(x):
    """exp(-x), to which 1 is added: results below 2**-126, of which exp takes care, are 0."""
    return tl.exp2(x * -1.4426950408889634)


@triton.jit
def _store_outputs(
    y, history, rows, taps, shift, starts, first, t, d, steps, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, GROUP: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """The outputs of a group; the next history."""
    at = y + (first + t) * channels
    for k in tl.static_range(GROUP):
        start = 0
        bound = channels
        if CHECKED:
            start = _find_start(starts, t + k, steps)
            bound = _only_if(t + k < steps, channels)
        total, _, history = _sum_taps(history, rows[k], taps, shift, t + k, start, WIDTH, CHECKED)
        if SILU:
            total = total / (1 + _exp_minus(total))
        tl.store(at + (k * channels + d), total, mask=d < bound)
    return history


@triton.jit
def _outputs(
    x, stride, weight, bias, starts, y, steps, channels, chunk,
    WIDTH: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    first, begin, end, d = _place(steps, chunk, CHANNELS)
    taps, shift = _load_filter(weight, bias, d, channels, WIDTH)
    history = _load_before(x, stride, first, begin, d, channels, WIDTH)
    rows = _load_group(x, stride, first, begin, d, steps, channels, GROUP)
    start = _find_start(starts, begin + GROUP - 1, steps)
    for t in range(begin, end, GROUP):
        later = t + GROUP  # is loaded while this group is computed
        later_rows = _load_group(x, stride, first, later, d, end, channels, GROUP)
        later_start = _find_start(starts, later + GROUP - 1, steps)
        if start <= t - (WIDTH - 1):
            history = _store_outputs(
                y, history, rows, taps, shift, starts, first, t, d, steps, channels,
                WIDTH, SILU, GROUP, False,
            )  # fmt: skip
        else:
            history = _store_outputs(
                y, history, rows, taps, shift, starts, first, t, d, steps, channels,
                WIDTH, SILU, GROUP, True,
            )  # fmt: skip
        rows = later_rows
        start = later_start


@triton.jit
def _store_gradients(
    grad_x, history, x_rows, grad_rows, taps, shift, open_sums, sums,
    starts, first, begin, t, d, steps, channels,
    WIDTH: tl.constexpr, SILU: tl.constexpr, GROUP: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs whose last output is in this group. `open_sums` are those of the
    inputs in `history`; `sums`, of the taps and the bias, go on."""
    at = grad_x + (first + t - (WIDTH - 1)) * channels  # whose last output is at t
    for k in tl.static_range(GROUP):
        start = 0
        bound = channels
        own = t + k - (WIDTH - 1)
        if CHECKED:
            start = _find_start(starts, t + k, steps)
            bound = _only_if((own >= begin) & (own < steps), channels)
        total, inputs, history = _sum_taps(
            history, x_rows[k], taps, shift, t + k, start, WIDTH, CHECKED
        )
        gradient = grad_rows[k].to(tl.float32)
        if SILU:
            s = 1 / (1 + _exp_minus(total))
            gradient *= s * (1 + total * (1 - s))
        further = ()
        further_sums = ()
        for j in tl.static_range(WIDTH):
            part = gradient * taps[j]
            if CHECKED:
                part = tl.where(own + j >= start, part, 0.0)
            if j < WIDTH - 1:
                part += open_sums[j]
            if j == 0:
                tl.store(at + (k * channels + d), part, mask=d < bound)
            else:
                further += (part,)
            further_sums += (sums[j] + gradient * inputs[j],)
        open_sums = further
        sums = further_sums + (sums[WIDTH] + gradient,)
    return history, open_sums, sums


@triton.jit
def _gradients(
    x, stride, weight, bias, starts, grad_y, grad_x, grad_weight, grad_bias,
    steps, channels, chunk,
    WIDTH: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    first, begin, end, d = _place(steps, chunk, CHANNELS)
    taps, shift = _load_filter(weight, bias, d, channels, WIDTH)
    history = _load_before(x, stride, first, begin, d, channels, WIDTH)
    open_sums = ()
    for _ in tl.static_range(WIDTH - 1):
        open_sums += (tl.zeros(d.shape, tl.float32),)
    sums = open_sums + (tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32))
    x_rows = _load_group(x, stride, first, begin, d, steps, channels, GROUP)
    grad_rows = _load_group(grad_y, channels, first, begin, d, steps, channels, GROUP)
    start = _find_start(starts, begin + GROUP - 1, steps)
    for t in range(begin, end, GROUP):
        later = t + GROUP  # is loaded while this group is computed
        bound = tl.minimum(steps, end + (WIDTH - 1))
        later_x = _load_group(x, stride, first, later, d, bound, channels, GROUP)
        later_grad = _load_group(grad_y, channels, first, later, d, bound, channels, GROUP)
        later_start = _find_start(starts, later + GROUP - 1, steps)
        if tl.maximum(start, begin) <= t - (WIDTH - 1):
            history, open_sums, sums = _store_gradients(
                grad_x, history, x_rows, grad_rows, taps, shift, open_sums, sums,
                starts, first, begin, t, d, steps, channels, WIDTH, SILU, GROUP, False,
            )  # fmt: skip
        else:
            history, open_sums, sums = _store_gradients(
                grad_x, history, x_rows, grad_rows, taps, shift, open_sums, sums,
                starts, first, begin, t, d, steps, channels, WIDTH, SILU, GROUP, True,
            )  # fmt: skip
        x_rows = later_x
        grad_rows = later_grad
        start = later_start
    # Inputs of the last steps are part of outputs behind the chunk, which are not this program's.
    _store_gradients(
        grad_x, history, x_rows, grad_rows, taps, shift, open_sums, sums,
        starts, first, begin, begin + tl.cdiv(end - begin, GROUP) * GROUP, d, steps, channels,
        WIDTH, SILU, WIDTH - 1, True,
    )  # fmt: skip
    share = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if grad_weight is not None:
        for j in tl.static_range(WIDTH):
            at = grad_weight + (share * WIDTH + j) * channels + d
            tl.store(at, sums[j], mask=d < channels)
    if grad_bias is not None:
        tl.store(grad_bias + share * channels + d, sums[WIDTH], mask=d < channels)
