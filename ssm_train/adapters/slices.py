"""A projection cut into slices of its rows, each a linear layer of its own: in_proj_x and in_proj_z
of in_proj. The same rows give the same outputs, so a method for linear layers can sit on one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssm_train.adapters.modules import project
from ssm_train.errors import InputError


class SlicedLinear(nn.Module):
    """A linear layer as its slices, which are its children in the order of its rows."""

    def __init__(self, whole: nn.Linear, rows: Mapping[str, int]) -> None:
        """`rows`: name of a slice -> its rows of the weight [out, in]."""
        super().__init__()
        assert sum(rows.values()) == whole.out_features, (rows, whole.out_features)
        weights = whole.weight.data.split(list(rows.values()))
        biases: Any = [None] * len(rows)
        if whole.bias is not None:
            biases = whole.bias.data.split(list(rows.values()))
        for name, weight, bias in zip(rows, weights, biases, strict=True):
            self.add_module(
                name, make_linear(type(whole), weight, bias, whole.weight.requires_grad)
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return torch.cat(project(x, *self.children()), dim=-1)

    def join(self) -> nn.Linear:
        """The whole layer again, once no slice is wrapped by an adapter."""
        parts: list[Any] = list(self.children())
        weight = torch.cat([part.weight.data for part in parts])
        bias = None
        if any(part.bias is not None for part in parts):  # BITFIT may have given one to a slice
            none = [part.weight.new_zeros(len(part.weight)) for part in parts]
            found = [n if p.bias is None else p.bias.data for p, n in zip(parts, none, strict=True)]
            bias = torch.cat(found)
        return make_linear(type(parts[0]), weight, bias, parts[0].weight.requires_grad)


def make_linear(
    kind: type[nn.Linear], weight: Tensor, bias: Tensor | None, requires_grad: bool
) -> nn.Linear:
    """A linear layer of that class with copies of weight [out, in] and bias [out]."""
    made = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone(), requires_grad=requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=requires_grad)
    return made


def find_slices(model: nn.Module) -> Iterator[tuple[str, str, Mapping[str, int]]]:
    """(mixer, name of its linear layer, slices of that) of every layer that a mixer says can be
    cut: its `slices`."""
    for place, module in model.named_modules():
        for linear, rows in getattr(module, "slices", {}).items():
            yield place, linear, rows


def slice_names(model: nn.Module) -> list[str]:
    """Names of the slices that this model has, each once."""
    return list(dict.fromkeys(name for *_, rows in find_slices(model) for name in rows))


def cut_slices(model: nn.Module, wanted: Callable[[str], object]) -> None:
    """Cuts the layers of which `wanted` names a slice, by its full name such as
    backbone.layers.0.mixer.in_proj.in_proj_x, unless it names the layer too.

    Raises InputError where an adapter is on the layer already.
    """
    for place, linear, rows in list(find_slices(model)):
        whole = f"{place}.{linear}"
        if wanted(whole) or not any(wanted(f"{whole}.{name}") for name in rows):
            continue
        mixer: Any = model.get_submodule(place)
        layer = getattr(mixer, linear)
        if isinstance(layer, nn.Linear):
            setattr(mixer, linear, SlicedLinear(layer, rows))
        elif not isinstance(layer, SlicedLinear):
            raise InputError(f"{whole} has an adapter already; its slices cannot have another one")


def join_slices(model: nn.Module) -> None:
    """Makes cut layers whole again where their slices have no adapter."""
    for place, linear, _ in list(find_slices(model)):
        mixer: Any = model.get_submodule(place)
        layer = getattr(mixer, linear)
        if isinstance(layer, SlicedLinear) and all(
            isinstance(part, nn.Linear) for part in layer.children()
        ):
            setattr(mixer, linear, layer.join())
