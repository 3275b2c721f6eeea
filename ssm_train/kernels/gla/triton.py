"""One step of gated linear attention in Triton, for decoding. The state, by far the most of what a
step reads and writes, is updated where it lies. Nothing is tuned at run time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 8192  # of a state in a program, 64 for a thread


def gla_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """`reference.gla` for q, k, g [B, 1, H, K] and v [B, 1, H, V], without gradients: returns o
    [B, 1, H, V] in v's dtype; `state` [B, H, K, V] fp32, contiguous, becomes the next one."""
    rows, length, heads, K = q.shape
    V = v.shape[-1]
    assert length == 1 and state.shape == (rows, heads, K, V), (q.shape, state.shape)
    assert state.dtype == torch.float32 and state.is_contiguous(), (state.dtype, state.stride())
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    keys = triton.next_power_of_2(K)
    values = min(triton.next_power_of_2(V), max(ELEMENTS // keys, 8))
    _step[rows * heads, triton.cdiv(V, values)](
        *(x.contiguous() for x in (q, k, v, g)), state, o, K**-0.5, K, V, KEYS=keys, VALUES=values
    )
    return o


@triton.jit
def _step(q, k, v, g, state, o, scale, K, V, KEYS: tl.constexpr, VALUES: tl.constexpr):
    """A program has all key channels and some value channels of one head of one row."""
    head = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, KEYS)
    j = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    place = state + head * K * V + i[:, None] * V + j[None, :]
    exists = (i < K)[:, None] & (j < V)[None, :]
    decay = tl.exp(tl.load(g + head * K + i, mask=i < K, other=0.0).to(tl.float32))
    key = tl.load(k + head * K + i, mask=i < K, other=0.0).to(tl.float32)
    query = tl.load(q + head * K + i, mask=i < K, other=0.0).to(tl.float32) * scale
    value = tl.load(v + head * V + j, mask=j < V, other=0.0).to(tl.float32)
    s = tl.load(place, mask=exists, other=0.0)
    s = s * decay[:, None] + key[:, None] * value[None, :]
    tl.store(place, s, mask=exists)
    tl.store(o + head * V + j, tl.sum(s * query[:, None], 0), mask=j < V)
