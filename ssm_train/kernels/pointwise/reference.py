"""Pointwise operations in plain PyTorch: the oracle, and what runs on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), each [..., D]."""
    return F.silu(gate) * up


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias, [..., D] and [D], in fp32 (fp64 if one of them is)."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, bias.dtype), torch.float32)
    return x + bias.to(dtype)  # x is cast on the way
