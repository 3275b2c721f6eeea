"""Mamba-2's scan in plain PyTorch: the oracle for other implementations, and what runs on CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T;  y_t = h_t C_t + D x_t, for every head.

    x [B, T, H, P]; dt [B, T, H]; A, D [H]; B, C [B, T, G, n]; initial_state [N or 1, H, P, n];
    returns y [B, T, H, P] in x's dtype and, if asked, the final states [N, H, P, n].
    """
    batch, length, heads, dim = x.shape
    if cu_seqlens is None:
        spans = [(slice(b, b + 1), 0, length) for b in range(batch)]
    else:
        ends = cu_seqlens.tolist()
        spans = [(slice(0, 1), s, e) for s, e in zip(ends[:-1], ends[1:], strict=True)]
    dtype = torch.promote_types(x.dtype, torch.float32)
    repeats = heads // B.shape[2]
    B, C = (v.to(dtype).repeat_interleave(repeats, dim=2) for v in (B, C))
    outputs, states = [], []
    for i, (row, start, end) in enumerate(spans):
        state = x.new_zeros((1, heads, dim, B.shape[-1]), dtype=dtype)
        if initial_state is not None:
            state = initial_state.to(dtype)[i % len(initial_state)][None]
        for t in range(start, end):
            dt_t = dt[row, t].to(dtype)  # [1, H]
            driven = (dt_t[..., None] * x[row, t])[..., None] * B[row, t, :, None]
            state = torch.exp(dt_t * A.to(dtype))[..., None, None] * state + driven
            outputs.append((state * C[row, t, :, None]).sum(-1))
        states.append(state)
    y = torch.cat(outputs).view(x.shape)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    return y.to(x.dtype), torch.cat(states) if output_final_state else None
