"""Linear layers with LoRA by their definition (arXiv 2106.09685, equation 3): the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LoraLinear(NamedTuple):
    """One layer: y = x weight^T + bias + scaling (x A^T) B^T."""

    weight: Tensor  # [out, in], the base
    bias: Tensor | None  # [out]
    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    scaling: float


def lora_linears(
    x: Tensor, layers: Sequence[LoraLinear], keep: Tensor | None = None
) -> tuple[Tensor, ...]:
    """x [..., in] -> one [..., out] a layer. `keep` [..., in]: what A's input is multiplied by."""
    a_input = x if keep is None else x * keep
    return tuple(
        F.linear(x, layer.weight, layer.bias)
        + layer.scaling * F.linear(F.linear(a_input, layer.A), layer.B)
        for layer in layers
    )


def row_norms(layer: LoraLinear) -> Tensor:
    """Norms of the rows of weight + scaling B A, [out]: what DoRA divides by (arXiv 2402.09353,
    equation 5)."""
    return torch.linalg.vector_norm(layer.weight + layer.scaling * layer.B @ layer.A, dim=1)
