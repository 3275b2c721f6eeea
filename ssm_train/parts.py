"""Parameters and gradients alike, whether a process has them whole or in parts (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ssm_train import distributed


def local(tensor: Tensor) -> Tensor:
    """What this process has of it; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of it, without a gradient. All ranks."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Any, value: Tensor) -> Tensor:
    """A whole value, cut as the parameter is. All ranks."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def collect(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies on the CPU of rank 0, elsewhere nothing. All ranks: where the iteration makes a tensor
    whole, one is at a time."""
    kept: dict[str, Tensor] = {}
    for name, tensor in named:
        if distributed.is_main():
            kept[name] = tensor.detach().to("cpu", copy=True)
        del tensor
    return kept


def find_zeros(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of which every element is zero. All ranks."""
    filled = [p for p in parameters if p.numel() and not p.is_meta]
    if not filled:
        return []
    device = filled[0].device
    anything = [local(p.detach()).any().to(device).float() for p in filled]
    found = _reduce(torch.stack(anything), filled, dist.ReduceOp.MAX).tolist()
    return [parameter for parameter, nonzero in zip(filled, found, strict=True) if not nonzero]


def take_norms(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norms of their gradients [P] fp32, 0 without one; the gradients are forgotten. All
    ranks."""
    parameters = list(parameters)
    device = parameters[0].device
    squares = []
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        norm = torch.zeros(()) if gradient is None else local(gradient).float().norm()
        squares.append(norm.to(device).double().square())  # fp32 would lose the smallest
    return _reduce(torch.stack(squares), parameters, dist.ReduceOp.SUM).sqrt().float()


def _reduce(values: Tensor, parameters: Sequence[Tensor], how: Any) -> Tensor:
    """values [P] of this process's parts, over all processes."""
    in_parts = torch.tensor([isinstance(p, DTensor) for p in parameters])
    if not in_parts.any():
        return values
    reduced = values.clone()
    dist.all_reduce(reduced, how)
    return torch.where(in_parts.to(values.device), reduced, values)
