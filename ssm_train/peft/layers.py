"""Layers of our own methods: values by adapter name, at a mixer's site or around a whole module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from ssm_train.adapters.modules import Fp32BiasLinear, autocasts
from ssm_train.errors import InputError

Values = Mapping[str, Tensor]
Init = Literal["zero", "random"]
RANDOM_STD = 0.1


class OwnLayer(nn.Module, BaseTunerLayer):
    """The values of one method around one module, by adapter name.

    Methods say how values begin (`create`) and what they change (`change`).
    """

    prefix: str
    """Begins the name of every parameter, which is how PEFT knows them."""

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "prefix"):
            cls.adapter_layer_names = (f"{cls.prefix}values",)

    def __init__(self, base_layer: nn.Module, owner: nn.Module, place: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.place = place  # its name in the model
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict())
        self.settings: dict[str, Any] = {}
        self.kept: list[Any] = []  # by `fold`, to take values out again
        self.merged_adapters = []
        self._owner = [owner]  # in a list: the owner is no part of its own part

    def __getattr__(self, name: str) -> Any:
        """What a layer does not have, its module has: `conv1d.kernel_size`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def values(self) -> Any:
        """adapter -> ParameterDict."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def owner(self) -> Any:
        """The module that has the base layer: a mixer, for sites."""
        return self._owner[0]

    def create(self, settings: Any) -> dict[str, Tensor]:
        """The values at the start, fp32."""
        raise NotImplementedError

    def add(self, adapter: str, settings: Any) -> None:
        values = {name: nn.Parameter(value) for name, value in self.create(settings).items()}
        self.values[adapter] = nn.ParameterDict(values)
        self.settings[adapter] = settings

    def active(self) -> Iterator[str]:
        """Adapters whose values count now: none where they are switched off or merged."""
        if not self.disable_adapters and not self.merged:
            yield from (name for name in self.active_adapters if name in self.values)

    def obstacle(self, adapter: str) -> str | None:
        """Why no weight can hold the values; None where one can, by `fold`."""
        return "no weight of the model computes the same"

    def fold(self, adapter: str, sign: int) -> None:
        """Adds the values (`sign` 1) to weights, or takes them out again (-1)."""
        raise NotImplementedError

    def check_merge(self, adapter: str, safe_merge: bool) -> None:
        """Raises InputError where no weight can hold the values and, with `safe_merge`, ValueError
        where one is not finite, as PEFT does."""
        if (reason := self.obstacle(adapter)) is not None:
            raise InputError(
                f"{self.place}: the adapter cannot be merged, because {reason}; keep it as an "
                "adapter"
            )
        if safe_merge and not all(bool(v.isfinite().all()) for v in self.values[adapter].values()):
            raise ValueError(f"{self.place}: adapter {adapter} has values that are not finite")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.values:
                self.check_merge(adapter, safe_merge)
                self.fold(adapter, 1)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self.fold(self.merged_adapters.pop(), -1)

    def enable_adapters(self, enabled: bool) -> None:
        """Switched off, merged values leave the weights, as in PEFT's own layers."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)


class SiteLayer(OwnLayer):
    """A method at a site of a mixer: changes the value that passes."""

    def forward(self, value: Any, *context: Tensor) -> Any:
        value = self.base_layer(value, *context)
        for adapter in self.active():
            value = self.change(adapter, value, *context)
        return value

    def change(self, adapter: str, value: Any, *context: Tensor) -> Any:
        raise NotImplementedError


class DeltaLayer(OwnLayer):
    """A module with some of its parameters moved: parameter + delta, by name.

    The same optimizer steps as training the parameter itself, but the base stays as it is.
    """

    def forward(self, x: Tensor, *inputs: Any, **options: Any) -> Any:
        moved: dict[str, Tensor] = {}
        for adapter in self.active():
            for name, delta in self.deltas(adapter).items():
                moved[name] = move(moved.get(name, getattr(self.base_layer, name)), delta)
        if not moved:
            return self.base_layer(x, *inputs, **options)
        ids = not x.is_floating_point()  # which embeddings read
        dtype = self.base_layer.weight.dtype if ids else x.dtype
        if dtype in (torch.bfloat16, torch.float16) and not autocasts(x):
            fp32 = {k: p.float() for k, p in self.base_layer.named_parameters(recurse=False)}
            wide = x if ids else x.float()
            output = functional_call(self.base_layer, fp32 | moved, (wide, *inputs), options)
            if isinstance(self.base_layer, Fp32BiasLinear):  # its output is fp32 for any input
                return output
            return tree_map_only(Tensor, lambda y: y.to(dtype), output)
        return functional_call(self.base_layer, moved, (x, *inputs), options)

    def obstacle(self, adapter: str) -> str | None:
        return None

    def deltas(self, adapter: str) -> Values:
        """Parameter of the module -> its delta: all values, unless a method has others too."""
        return dict(self.values[adapter].items())

    def fold(self, adapter: str, sign: int) -> None:
        for name, delta in self.deltas(adapter).items():
            parameter = getattr(self.base_layer, name)
            if parameter is None:
                self.kept.append((adapter, name))
            elif sign < 0 and (adapter, name) in self.kept:  # there was none before
                self.kept.remove((adapter, name))
                setattr(self.base_layer, name, None)
                continue
            moved = move(parameter, sign * delta)
            stored = delta.dtype if parameter is None else parameter.dtype
            setattr(self.base_layer, name, nn.Parameter(moved.to(stored), requires_grad=False))


def move(parameter: Tensor | None, delta: Tensor) -> Tensor:
    """parameter + delta in fp32; the delta alone where there is no parameter."""
    return delta if parameter is None else parameter.to(delta.dtype) + delta


def low_rank(shape: tuple[int, ...], r: int, key: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """A product of rank r that is zero: left [..., r] of zeros, right [r, columns] as LoRA's A.

    shape [..., columns]; `key`: of the settings. Raises InputError for a rank above the matrix's.
    """
    *rows, columns = shape
    if r > (largest := min(math.prod(rows), columns)):
        raise InputError(
            f"{key} is {r}, but the matrix is {math.prod(rows)} x {columns}, of rank {largest} at "
            f"most; lower {key}"
        )
    right = torch.empty(r, columns, device=like.device)
    nn.init.kaiming_uniform_(right, a=math.sqrt(5))
    return zeros(*rows, r, like=like), right


def start(init: Init, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Values at the start, fp32: zeros, or normal with a deviation of 0.1."""
    scale = RANDOM_STD if init == "random" else 0.0
    return scale * torch.randn(shape, dtype=torch.float32, device=like.device)


def zeros(*shape: int, like: Tensor) -> Tensor:
    """fp32, on the device of `like`."""
    return torch.zeros(shape, dtype=torch.float32, device=like.device)
