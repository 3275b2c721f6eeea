"""Weights that rank 0 has, given to all ranks a part of the model at a time: no other process ever
holds more than its own share of them and one layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssm_train import distributed


def place() -> str:
    """Where this process makes the weights that are dealt: see `adapters.base.ModelSpec.place`."""
    return "cpu" if distributed.is_main() else "meta"


def contents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and buffers by name: what `Dealer` takes on rank 0."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return weights, dict(model.named_buffers())


class Dealer:
    """Fills `model`, whose shapes, dtypes and ties are the same on all ranks, and whose values only
    need to be in `weights` of rank 0. Modules stay; their parameters are new ones on `device`.

    A weight leaves `weights` when it is dealt.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, Tensor],
        buffers: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        """All ranks. Deals the buffers, which are small, at once."""
        self.weights, self.device = weights, device
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self.places.setdefault(names[id(parameter)], []).append((module, key))
        self.names = names
        for prefix, module in model.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    module._buffers[key] = self._share(buffers.get(name), buffer)

    def deal(self, part: nn.Module) -> None:
        """All ranks. The parameters of a part of the model that were not dealt before."""
        for parameter in list(part.parameters()):
            name = self.names.pop(id(parameter), None)
            if name is None:
                continue
            value = self._share(self.weights.pop(name, None), parameter)
            dealt = nn.Parameter(value, parameter.requires_grad)
            for module, key in self.places[name]:
                module._parameters[key] = dealt

    def _share(self, value: Tensor | None, like: Tensor) -> Tensor:
        """On `device`, rank 0's value."""
        if distributed.is_main() and value is not None:
            shared = value.to(self.device, memory_format=torch.contiguous_format, copy=True)
        else:
            shared = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        dist.broadcast(shared, 0)
        return shared
