"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): only biases train, W x + b + delta; where a
target has no bias, it gets one of zeros."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor, nn

from ssm_train.adapters.modules import CausalConv1d, matches
from ssm_train.adapters.slices import cut_slices
from ssm_train.errors import InputError, near
from ssm_train.peft.layers import DeltaLayer, OwnLayer, zeros
from ssm_train.peft.tuner import OwnTuner, bare_modules
from ssm_train.settings import Settings

BIASED = (nn.Linear, CausalConv1d)


class BitFitSettings(Settings):
    """The keys of a BITFIT JSON."""

    target_modules: list[str] | None = Field(default=None, min_length=1)
    """Names of linear layers and convolutions, or their ends; None: all that have a bias."""


class BitFitLayer(DeltaLayer):
    prefix = "bitfit_"

    def create(self, settings: BitFitSettings) -> dict[str, Tensor]:
        """bias [outputs]."""
        layer: Any = self.base_layer
        return {"bias": zeros(layer.weight.shape[0], like=layer.weight)}


class BitFitModel(OwnTuner):
    peft_name = "BITFIT"
    prefix = BitFitLayer.prefix
    settings_class = BitFitSettings

    def choose(self, settings: BitFitSettings, model: nn.Module) -> dict[str, type[OwnLayer]]:
        targets = settings.target_modules or []
        cut_slices(model, lambda name: matches(name, targets))
        modules: dict[str, Any] = {
            name: module
            for name, module in bare_modules(model).items()
            if isinstance(module, BIASED)
        }
        if settings.target_modules is None:
            found = {name for name, module in modules.items() if module.bias is not None}
            if not found:
                raise InputError("target_modules: no layer has a bias; name those to give one")
            return dict.fromkeys(found, BitFitLayer)
        found = set()
        for target in settings.target_modules:
            hits = {name for name in modules if matches(name, [target])}
            if not hits:
                known = dict.fromkeys(name.rpartition(".")[2] for name in modules)
                hint = near(target, known) or f"; layers here: {', '.join(known)}"
                raise InputError(f"target_modules: {target!r} matches no layer{hint}")
            found |= hits
        return dict.fromkeys(found, BitFitLayer)
