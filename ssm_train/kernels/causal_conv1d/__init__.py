"""The short depthwise causal convolution: the public op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_train.kernels import implementation
from ssm_train.kernels.causal_conv1d import reference

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernels: str = "auto",
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`reference.causal_conv1d`, by the implementation for x's device; fp64 by the reference."""
    if x.dtype != torch.float64 and implementation(kernels, x.device) == "triton":
        from ssm_train.kernels.causal_conv1d import triton

        return triton.causal_conv1d(x, weight, bias, **options)
    return reference.causal_conv1d(x, weight, bias, **options)
