"""Selective scan in plain PyTorch: the oracle for other implementations, and what runs on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = (C_t . h_t + D u_t) silu(z_t).

    u, dt, z [B, T, d]; A [d, n]; B, C [B, T, n]; D [d]; initial_state [N or 1, d, n]; returns
    y [B, T, d] in u's dtype and, if asked, the final states [N, d, n] (N documents, or N = B).
    """
    batch, length, _ = u.shape
    if cu_seqlens is None:
        spans = [(slice(b, b + 1), 0, length) for b in range(batch)]
    else:
        ends = cu_seqlens.tolist()
        spans = [(slice(0, 1), s, e) for s, e in zip(ends[:-1], ends[1:], strict=True)]
    dtype = torch.promote_types(u.dtype, torch.float32)
    outputs, states = [], []
    for i, (row, start, end) in enumerate(spans):
        state = u.new_zeros((1, *A.shape), dtype=dtype)
        if initial_state is not None:
            state = initial_state.to(dtype)[i % len(initial_state)][None]
        for t in range(start, end):
            dt_t = dt[row, t].to(dtype)[..., None]
            driven = dt_t * B[row, t].to(dtype)[:, None] * u[row, t].to(dtype)[..., None]
            state = torch.exp(dt_t * A.to(dtype)) * state + driven
            outputs.append((state * C[row, t].to(dtype)[:, None]).sum(-1))
        states.append(state)
    y = torch.cat(outputs).view(u.shape)
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), torch.cat(states) if output_final_state else None
