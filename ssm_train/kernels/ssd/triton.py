"""One step of Mamba-2's recurrence in Triton, for decoding. The state, by far the most of what a
step reads and writes, is updated where it lies. Nothing is tuned at run time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 8192  # of a state in a program, 64 for a thread


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> Tensor:
    """`reference.ssd` for x [B, 1, H, P], dt [B, 1, H], A [H], B and C [B, 1, G, n] and D [H],
    without gradients: returns y [B, 1, H, P] in x's dtype; `state` [B, H, P, n] fp32, contiguous,
    becomes the next one."""
    rows, length, heads, dim = x.shape
    groups, n = B.shape[2:]
    assert length == 1 and state.shape == (rows, heads, dim, n), (x.shape, state.shape)
    assert state.dtype == torch.float32 and state.is_contiguous(), (state.dtype, state.stride())
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = triton.next_power_of_2(n)
    channels = min(triton.next_power_of_2(dim), max(ELEMENTS // columns, 8))
    _step[rows * heads, triton.cdiv(dim, channels)](
        *(v.contiguous() for v in (x, dt, A, B, C)), D, state, y, heads, heads // groups, dim, n,
        CHANNELS=channels, COLUMNS=columns,
    )  # fmt: skip
    return y


@triton.jit
def _step(
    x, dt, A, B, C, D, state, y, heads, group_heads, dim, n,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program has some channels of one head of one row, and all n columns of their state."""
    row_head = tl.program_id(0).to(tl.int64)
    head = row_head % heads
    group = row_head // group_heads  # of all rows: heads are a multiple of the groups
    i = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    j = tl.arange(0, COLUMNS)
    place = state + row_head * dim * n + i[:, None] * n + j[None, :]
    exists = (i < dim)[:, None] & (j < n)[None, :]
    step = tl.load(dt + row_head).to(tl.float32)
    decay = tl.exp(step * tl.load(A + head).to(tl.float32))
    value = tl.load(x + row_head * dim + i, mask=i < dim, other=0.0).to(tl.float32)
    key = tl.load(B + group * n + j, mask=j < n, other=0.0).to(tl.float32)
    query = tl.load(C + group * n + j, mask=j < n, other=0.0).to(tl.float32)
    s = tl.load(place, mask=exists, other=0.0)
    s = s * decay + (value * step)[:, None] * key[None, :]
    tl.store(place, s, mask=exists)
    out = tl.sum(s * query[None, :], 1)
    if D is not None:
        out += value * tl.load(D + head).to(tl.float32)
    tl.store(y + row_head * dim + i, out, mask=i < dim)
