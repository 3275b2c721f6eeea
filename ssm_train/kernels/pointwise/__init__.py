"""What happens to single elements between two products, in one pass over memory: the public ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_train.kernels import implementation
from ssm_train.kernels.pointwise import reference

__all__ = ["add_bias", "swiglu"]


def swiglu(gate: Tensor, up: Tensor, *, kernels: str = "auto") -> Tensor:
    """`reference.swiglu`, by the implementation for its device; fp64 by the reference."""
    result: Tensor = choose(kernels, gate, up).swiglu(gate, up)
    return result


def add_bias(x: Tensor, bias: Tensor, *, kernels: str = "auto") -> Tensor:
    """`reference.add_bias`, by the implementation for its device; fp64 by the reference."""
    result: Tensor = choose(kernels, x, bias).add_bias(x, bias)
    return result


def choose(kernels: str, *inputs: Tensor) -> Any:
    """The module that computes with them."""
    in_fp64 = any(x.dtype == torch.float64 for x in inputs)
    if not in_fp64 and implementation(kernels, inputs[0].device) == "triton":
        from ssm_train.kernels.pointwise import triton

        return triton
    return reference
