"""Mamba's selective scan: the public op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_train.kernels import implementation
from ssm_train.kernels.selective_scan import reference

__all__ = ["selective_scan"]


def selective_scan(
    u: Tensor, *matrices: Tensor, kernels: str = "auto", **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`reference.selective_scan`, by the implementation for u's device; fp64 by the reference."""
    if u.dtype != torch.float64 and implementation(kernels, u.device) == "triton":
        from ssm_train.kernels.selective_scan import triton

        return triton.selective_scan(u, *matrices, **options)
    return reference.selective_scan(u, *matrices, **options)
