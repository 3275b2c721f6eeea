"""RMSNorm, of a sum or gated: the public ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_train.kernels import implementation
from ssm_train.kernels.rms_norm import reference

__all__ = ["gated_rms_norm", "rms_norm"]


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    kernels: str = "auto",
) -> Any:
    """`reference.rms_norm`, by the implementation for x's device; fp64 by the reference."""
    return choose(x, kernels).rms_norm(x, weight, eps, residual=residual, dtype=dtype)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    gate_first: bool = False,
    group_size: int | None = None,
    kernels: str = "auto",
) -> Tensor:
    """`reference.gated_rms_norm`, by the implementation for x's device; fp64 by the reference."""
    return choose(x, kernels).gated_rms_norm(
        x, gate, weight, eps, gate_first=gate_first, group_size=group_size
    )


def choose(x: Tensor, kernels: str) -> Any:
    """The module that computes with x."""
    if x.dtype != torch.float64 and implementation(kernels, x.device) == "triton":
        from ssm_train.kernels.rms_norm import triton

        return triton
    return reference
