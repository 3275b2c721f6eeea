"""A model without its weights beside one whose weights are spread over processes: filled for as
long as all of them are needed on one process, to evaluate or to write."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class HollowModel:
    """A copy of `model` on the meta device; buffers are copied, ties between parameters stay."""

    def __init__(self, model: nn.Module) -> None:
        hollow: dict[int, Any] = {}
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            hollow[id(parameter)], names[id(empty)] = empty, name
        self.model = copy.deepcopy(model, dict(hollow))
        self.places = [
            (module, key, names[id(parameter)], parameter)
            for module in self.model.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]

    def fill(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The model with these weights, which it shares; in evaluation mode as after `eval()`."""
        filled = {
            name: nn.Parameter(tensor.detach(), requires_grad=False)
            for name, tensor in tensors.items()
        }
        for module, key, name, empty in self.places:
            filled[name].requires_grad_(empty.requires_grad)
            module._parameters[key] = filled[name]
        return self.model

    @contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """`fill`, for as long as the context lasts."""
        try:
            yield self.fill(tensors)
        finally:
            for module, key, _, empty in self.places:
                module._parameters[key] = empty
