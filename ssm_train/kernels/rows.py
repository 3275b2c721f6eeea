"""How kernels see rows of tokens in memory."""

from __future__ import annotations

from torch import Tensor


def by_rows(x: Tensor) -> Tensor:
    """x [B, T, ...] with a dense end, and one stride from step to step, also between batches."""
    dense = x[0, 0].is_contiguous() and x.stride(0) == x.shape[1] * x.stride(1)
    return x if dense else x.contiguous()
