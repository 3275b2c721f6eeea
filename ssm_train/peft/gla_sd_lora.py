"""GLA_SD_LORA: SD_LORA for gated linear attention. The key channels whose gate, a row of
gk_proj.1, moves most in the warm-up train; there are no states to choose."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ssm_train.adapters.modules import matches, under_adapters
from ssm_train.errors import InputError
from ssm_train.peft.dimensions import Counts
from ssm_train.peft.layers import OwnLayer
from ssm_train.peft.sd_lora import SdLoraModel
from ssm_train.peft.sd_lora_settings import SdLoraSettings
from ssm_train.peft.sparse import ForgetLayer, ProjectionLayer
from ssm_train.peft.tuner import bare_modules, family_of


class GlaSdLoraSettings(SdLoraSettings):
    """The keys of a GLA_SD_LORA JSON: those of SD_LORA. Of a layer's key channels 0.4 train, 0.5
    freeze and 0.1 are zeroed, unless the keys say otherwise."""

    num_freeze: Counts = Counts(channel=0.5)
    """{channel}: key channels that stay as they are; a fraction, or a whole number."""
    num_zero: Counts = Counts(channel=0.1)
    """{channel}: key channels that contribute their own step only."""

    chooser: ClassVar[str] = "gk_proj.1"
    default_sparse: ClassVar[tuple[str, ...]] = ("gk_proj.1",)
    default_lora: ClassVar[tuple[str, ...]] = tuple(f"attn.{name}_proj" for name in "qkvo")

    @property
    def dense_names(self) -> list[str]:
        return [self.chooser] if self.stage == "warmup" else []


class GlaSdLoraModel(SdLoraModel):
    peft_name = "GLA_SD_LORA"
    settings_class = GlaSdLoraSettings

    def choosing_layers(
        self, settings: SdLoraSettings, model: nn.Module
    ) -> dict[str, type[OwnLayer]]:
        places = bare_modules(model)
        found = [place for place in places if matches(place, ["gk_proj.1"])]
        if not found:
            raise InputError(
                f"peft_type {self.peft_name}: {family_of(model)} models have no gk_proj.1 to "
                "choose from; use SD_LORA"
            )
        chosen: dict[str, type[OwnLayer]] = dict.fromkeys(found, ProjectionLayer)
        gate = under_adapters(model.get_submodule(found[0]))
        zeroed = settings.divide_channels(len(gate.weight), "key channels").zero
        if settings.stage == "train" and zeroed:
            sites = [place for place in places if matches(place, ["forgotten"])]
            chosen |= dict.fromkeys(sites, ForgetLayer)
        return chosen
