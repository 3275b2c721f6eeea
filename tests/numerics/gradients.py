"""What tests of kernels compare: values, final states and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def value_and_gradients(
    op: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor]
) -> list[Tensor]:
    """The output and the final state (of a convolution, its window) of `op(**inputs)`, and the
    gradients of a loss in which every element of both counts."""
    y, state = op(**inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (v * torch.randn(v.shape, generator=generator, dtype=torch.float64)).sum()
        for v in (y.double(), state.double())
    )
    return [y, state, *torch.autograd.grad(loss, list(inputs.values()))]
