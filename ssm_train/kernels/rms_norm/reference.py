"""RMSNorm (arXiv 1910.07467) in plain PyTorch: the oracle, and what runs on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = total / sqrt(mean(total^2) + eps) * weight, with total = x, or x + residual.

    Args:
        x: [..., D]. weight: [D], ones if None.
        residual: [..., D], in a dtype of its own.
        dtype: of y; x's if None.

    Returns:
        y [..., D]; with a residual also the total, in the residual's dtype. Inside, all of it is
        fp32 (fp64 for fp64 inputs): the norm is that of the total before it is rounded.
    """
    dtype = dtype or x.dtype
    total = x.to(torch.promote_types(x.dtype, torch.float32))
    if residual is None:
        return normalize(total, weight, eps).to(dtype)
    assert residual.shape == x.shape, (residual.shape, x.shape)
    total = total + residual
    return normalize(total, weight, eps).to(dtype), total.to(residual.dtype)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    gate_first: bool = False,
    group_size: int | None = None,
) -> Tensor:
    """norm(x) * weight * silu(gate), GLA's; with `gate_first` norm(x * silu(gate)) * weight,
    Mamba-2's.

    Args:
        x, gate: [..., D]. weight: [D], ones if None.
        group_size: channels that are normed together, a divisor of D; all of them if None.

    Returns:
        y [..., D] in x's dtype, computed in fp32 (fp64 for fp64 inputs).
    """
    assert gate.shape == x.shape, (gate.shape, x.shape)
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    opened = F.silu(gate.to(value.dtype))
    if gate_first:
        return normalize(value * opened, weight, eps, group_size).to(x.dtype)
    return (normalize(value, weight, eps, group_size) * opened).to(x.dtype)


def normalize(
    x: Tensor, weight: Tensor | None, eps: float, group_size: int | None = None
) -> Tensor:
    """RMSNorm in x's dtype, groups of channels apart: x [..., D], weight [D]."""
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = F.rms_norm(groups, groups.shape[-1:], eps=eps).flatten(-2)
    return y if weight is None else y * weight.to(y.dtype)
