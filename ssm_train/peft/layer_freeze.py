"""LAYER_FREEZE: trains only the parameters whose names have one of the entries as whole parts, such
as A_log, D, conv1d; as a delta on each, so that the base stays as it is."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from ssm_train.adapters.slices import cut_slices
from ssm_train.errors import InputError, near
from ssm_train.peft.layers import DeltaLayer, OwnLayer, SiteLayer, zeros
from ssm_train.peft.tuner import OwnTuner, bare_modules
from ssm_train.settings import Settings

SITE_OF = {"A_log": "log_decay", "D": "skip", "dt_bias": "step_bias"}
"""Parameter of a mixer itself -> the site that it passes."""


class LayerFreezeSettings(Settings):
    """The keys of a LAYER_FREEZE JSON."""

    trainable_layers: list[str] = Field(min_length=1)
    """Parts of parameter names, such as A_log, dt_proj.bias or layers.3."""


class ModuleDelta(DeltaLayer):
    """Deltas of a module's chosen parameters."""

    prefix = "layer_freeze_"

    def create(self, settings: LayerFreezeSettings) -> dict[str, Tensor]:
        return {
            name: zeros(*parameter.shape, like=parameter)
            for name, parameter in self.base_layer.named_parameters(recurse=False)
            if is_named(f"{self.place}.{name}", settings.trainable_layers)
        }


class SiteDelta(SiteLayer):
    """Delta of a mixer's own parameter, where it passes its site."""

    prefix = ModuleDelta.prefix

    @property
    def parameter_name(self) -> str:
        return {site: name for name, site in SITE_OF.items()}[self.place.rpartition(".")[2]]

    def create(self, settings: LayerFreezeSettings) -> dict[str, Tensor]:
        parameter = getattr(self.owner, self.parameter_name)
        return {"delta": zeros(*parameter.shape, like=parameter)}

    def change(self, adapter: str, value: Any, *context: Tensor) -> Tensor:
        return value + self.values[adapter]["delta"]

    def obstacle(self, adapter: str) -> str | None:
        return None

    def fold(self, adapter: str, sign: int) -> None:
        getattr(self.owner, self.parameter_name).data += sign * self.values[adapter]["delta"].data


class LayerFreezeModel(OwnTuner):
    peft_name = "LAYER_FREEZE"
    prefix = ModuleDelta.prefix
    settings_class = LayerFreezeSettings

    def choose(self, settings: LayerFreezeSettings, model: nn.Module) -> dict[str, type[OwnLayer]]:
        entries = settings.trainable_layers
        cut_slices(model, lambda place: names_parameter(place, entries))
        modules = bare_modules(model)
        parameters = {
            f"{place}.{name}": parameter
            for place, module in modules.items()
            for name, parameter in module.named_parameters(recurse=False)
        }
        for entry in entries:
            if not any(is_named(name, [entry]) for name in parameters):
                parts = dict.fromkeys(part for name in parameters for part in name.split("."))
                raise InputError(
                    f"trainable_layers: {entry!r} is in no parameter name{near(entry, parts)}"
                )
        shared = Counter(map(id, parameters.values()))
        chosen: dict[str, type[OwnLayer]] = {}
        for name, parameter in parameters.items():
            if not is_named(name, entries):
                continue
            if shared[id(parameter)] > 1:
                raise InputError(
                    f"trainable_layers: {name} is shared by two modules (tie_word_embeddings), and "
                    "only one of them would be trained; leave it out"
                )
            place, _, last = name.rpartition(".")
            site = f"{place}.{SITE_OF.get(last)}"
            chosen |= {site: SiteDelta} if site in modules else {place: ModuleDelta}
        return chosen


def names_parameter(place: str, entries: list[str]) -> bool:
    """Whether an entry names a parameter of the linear layer of this name."""
    return any(is_named(f"{place}.{name}", entries) for name in ("weight", "bias"))


def is_named(name: str, entries: list[str]) -> bool:
    """Whether a dotted name has one of the entries as whole parts."""
    return any(f".{entry}." in f".{name}." for entry in entries)
