"""SD_LORA: sparse dimension tuning with LoRA (Galim et al. 2025, arXiv 2410.09016). A warm-up finds
the channels and states of A that move most; then those alone train, with LoRA on the projections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from ssm_train.adapters.base import Prepared
from ssm_train.adapters.common import Site
from ssm_train.adapters.slices import cut_slices, slice_names
from ssm_train.errors import InputError, near
from ssm_train.peft.dimensions import Choice, Counts, Division, Selection, Share, choose, divide
from ssm_train.peft.layer_freeze import SITE_OF, is_named
from ssm_train.peft.sparse import (
    AXIS_OF_CHANNELS,
    ChosenLayer,
    DecayLayer,
    FinetunedSite,
    ProjectionLayer,
    is_target,
)
from ssm_train.peft.tuner import (
    OwnConfig,
    OwnLayer,
    OwnMethod,
    OwnTuner,
    bare_modules,
    own_layers,
)
from ssm_train.settings import Settings


class SdLoraSettings(Settings):
    """The keys of a SD_LORA JSON."""

    target_modules: list[str] | None = Field(default=None, min_length=1)
    """A_log, x_proj_B and x_proj_C train in the chosen dimensions; a projection gets LoRA, or
    without `proj_lora_r` trains in the chosen channels. None: the first three."""
    lora_targets: list[str] | None = None
    """Projections that get LoRA; None: those of `target_modules`, else in_proj and out_proj."""
    num_freeze: Counts = Counts(channel=0.99, state=0.75)
    """{channel, state}: how many stay as they are; a fraction, or a whole number."""
    num_zero: Counts = Counts()
    """{channel, state}: channels that lose their memory; its state count is 0."""
    train_ratio: float | None = Field(default=None, ge=0, le=1)
    """Fraction of channels that train; what neither trains nor freezes is zeroed."""
    freeze_ratio: float | None = Field(default=None, ge=0, le=1)
    """Fraction of channels that freeze, instead of num_freeze's."""
    zero_ratio: float | None = Field(default=None, ge=0, le=1)
    """Fraction of channels that are zeroed, instead of num_zero's."""
    num_warmup_it: int = Field(default=499, ge=0)
    """The warm-up is this many optimizer steps and one more."""
    proj_lora_r: int | None = Field(default=8, ge=1)
    """Rank of LoRA on the projections."""
    proj_lora_alpha: float | None = Field(default=None, gt=0)
    """Its update is scaled by alpha / r; None: alpha is r."""
    proj_lora_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on the input of A."""
    sdlora_alpha: float | dict[str, float] = 1.0
    """What values on chosen cells are multiplied by: a number, or one by target and "global"."""
    finetune_parameters: list[str] | None = None
    """Parts of names of parameters that train in full, such as D or dt_proj.bias."""
    select_mode: Literal["CHANNELS_PER_STATE_CHANNELS"] = "CHANNELS_PER_STATE_CHANNELS"
    """Channels first, then states within each."""
    proj_select_mode: Literal["CHANNELS_ALL_STATES"] = "CHANNELS_ALL_STATES"
    """All weights of a chosen channel."""
    stage: Literal["warmup", "train"] = "train"
    """Which stage an adapter is of; a run sets it itself."""

    chooser: ClassVar[str] = "A_log"
    """Target whose movement in the warm-up chooses."""
    default_sparse: ClassVar[tuple[str, ...]] = ("x_proj_B", "x_proj_C")
    default_lora: ClassVar[tuple[str, ...]] = ("in_proj", "out_proj")

    @model_validator(mode="after")
    def _adds_up(self) -> SdLoraSettings:
        if self.target_modules and self.chooser not in self.target_modules:
            raise ValueError(
                f"target_modules: {self.chooser} is missing, whose warm-up chooses; add it"
            )
        if self.num_zero.state:
            raise ValueError("num_zero: only whole channels are zeroed; set its state to 0")
        freeze, zero = self.frozen_channels, self.zeroed_channels
        ratios = [self.train_ratio, self.freeze_ratio, self.zero_ratio]
        given = [ratio for ratio in ratios if ratio is not None]
        if len(given) == 3 and abs(math.fsum(given) - 1) > 1e-6:
            raise ValueError(
                f"train_ratio, freeze_ratio and zero_ratio are {given[0]}, {given[1]} and "
                f"{given[2]}, together {math.fsum(given):g} and not 1; leave one of them out"
            )
        if zero < 0 or (
            isinstance(freeze, float) and isinstance(zero, float) and freeze + zero > 1
        ):
            shares = {"train": self.train_ratio, "freeze": freeze, "zero": zero}
            named = ", ".join(f"{k} {v}" for k, v in shares.items() if v is not None and v >= 0)
            raise ValueError(f"fractions of channels are more than 1 together: {named}; lower one")
        for name in self.sparse_names:
            if name not in AXIS_OF_CHANNELS:
                raise ValueError(
                    f"target_modules: the channels of {name} are no rows or columns of it; set "
                    f"proj_lora_r, or name one of {', '.join(AXIS_OF_CHANNELS)}"
                )
        return self

    @property
    def projections(self) -> list[str]:
        """Of `target_modules` those that get LoRA where there is a rank."""
        named = self.target_modules or []
        return [name for name in named if name not in (self.chooser, *self.default_sparse)]

    @property
    def lora_names(self) -> list[str]:
        """Projections with LoRA."""
        if self.proj_lora_r is None:
            return []
        if self.lora_targets is not None:
            return self.lora_targets
        return self.projections or list(self.default_lora)

    @property
    def sparse_names(self) -> list[str]:
        """Linear layers that train in the chosen channels; in the warm-up none."""
        if self.stage == "warmup":
            return []
        named = self.target_modules or [*self.default_sparse]
        return [name for name in named if name not in (*self.lora_names, "A_log")]

    @property
    def dense_names(self) -> list[str]:
        """Linear layers with a dense delta: the chooser in the warm-up, where it is one."""
        return []

    @property
    def frozen_channels(self) -> Share:
        """Number or fraction of the channels that freeze."""
        if self.freeze_ratio is not None:
            return self.freeze_ratio
        if self.train_ratio is not None and self.zero_ratio is not None:
            return round(1 - self.train_ratio - self.zero_ratio, 9)
        return self.num_freeze.channel

    @property
    def zeroed_channels(self) -> Share:
        """Number or fraction of the channels that are zeroed."""
        if self.zero_ratio is not None:
            return self.zero_ratio
        if self.train_ratio is not None and isinstance(self.frozen_channels, float):
            return round(1 - self.train_ratio - self.frozen_channels, 9)
        return self.num_zero.channel

    @property
    def lora_scale(self) -> float:
        """alpha / r of the projections."""
        if self.proj_lora_r is None or self.proj_lora_alpha is None:
            return 1.0
        return self.proj_lora_alpha / self.proj_lora_r

    def divide_channels(self, size: int) -> Division:
        return divide(size, self.frozen_channels, self.zeroed_channels, "channels")

    def divide_states(self, size: int) -> Division:
        return divide(size, self.num_freeze.state, 0, "states")

    def alpha(self, target: str) -> float:
        """What the values on a target's cells are multiplied by."""
        if isinstance(self.sdlora_alpha, dict):
            return self.sdlora_alpha.get(target, 1.0) * self.sdlora_alpha.get("global", 1.0)
        return self.sdlora_alpha


class SdLoraModel(OwnTuner):
    peft_name = "SD_LORA"
    prefix = DecayLayer.prefix
    settings_class = SdLoraSettings
    changes_function = "zeroed channels lose their memory (num_zero)"

    def choose(self, settings: SdLoraSettings, model: nn.Module) -> dict[str, type[OwnLayer]]:
        chosen = self.choosing_layers(settings, model)
        named = [*settings.sparse_names, *settings.lora_names]
        cut_slices(model, lambda name: is_target(name, named))
        modules = bare_modules(model)
        for name in named:
            found = [place for place in modules if is_target(place, [name])]
            if not found and not (
                settings.target_modules is None and name in settings.sparse_names
            ):
                known = dict.fromkeys(place.rpartition(".")[2] for place in modules)
                raise InputError(
                    f"peft_type {self.peft_name}: {name!r} matches no module"
                    f"{near(name, [*known, *slice_names(model)])}"
                )
            for place in found:
                if not isinstance(modules[place], nn.Linear):
                    raise InputError(f"target_modules: {place} is no linear layer; remove {name}")
            chosen |= dict.fromkeys(found, ProjectionLayer)
        return chosen | find_finetuned(settings.finetune_parameters or [], modules, chosen)

    def choosing_layers(
        self, settings: SdLoraSettings, model: nn.Module
    ) -> dict[str, type[OwnLayer]]:
        """The places whose movement chooses."""
        found = [place for place in bare_modules(model) if is_target(place, ["log_decay"])]
        if not found:
            family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise InputError(
                f"peft_type {self.peft_name}: {family} models have no A_log to choose from"
                + ("; use GLA_SD_LORA" if family == "gla" else "")
            )
        return dict.fromkeys(found, DecayLayer)


def find_finetuned(
    entries: list[str], modules: Mapping[str, nn.Module], taken: Mapping[str, type[OwnLayer]]
) -> dict[str, type[OwnLayer]]:
    """Module or site -> layer, for the parameters that train in full. Raises InputError."""
    found: dict[str, type[OwnLayer]] = {}
    for entry in entries:
        places: dict[str, type[OwnLayer]] = {}
        for place, module in modules.items():
            for name, _ in module.named_parameters(recurse=False):
                if is_named(f"{place}.{name}", [entry]):
                    site = f"{place}.{SITE_OF.get(name)}"
                    at_site = isinstance(modules.get(site), Site)
                    places |= {site: FinetunedSite} if at_site else {place: ProjectionLayer}
        if not places:
            raise InputError(f"finetune_parameters: {entry!r} is in no parameter name")
        if clash := [place for place in places if taken.get(place) is DecayLayer]:
            raise InputError(f"finetune_parameters: {entry!r} trains {clash[0]}, which is a target")
        found |= places
    return found


class SdLoraMethod(OwnMethod):
    """SD_LORA as a PeftMethod of two stages."""

    settings: SdLoraSettings

    def __init__(self, config_class: type[OwnConfig], settings: SdLoraSettings) -> None:
        if settings.stage != "train":
            raise InputError("stage: a run goes through both stages by itself; remove it")
        super().__init__(config_class, settings.model_copy(update={"stage": "warmup"}))

    def stages(self) -> tuple[str, ...]:
        return ("warmup", "train")

    @property
    def stage(self) -> str:
        """The stage that `inject` begins, or has begun."""
        return self.settings.stage

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the first stage."""
        return self.settings.num_warmup_it + 1

    def select(self, model: nn.Module) -> Selection:
        """The dimensions that the warm-up of `model` chose."""
        return select_dimensions(model, self.settings)

    def begin_training(self, prepared: Prepared, selection: Selection | None = None) -> None:
        """The second stage, from the pretrained weights: what the warm-up trained is dropped.

        Without a selection `restore_base` gives it.
        """
        if hasattr(prepared.model, "peft_config"):
            prepared.model = prepared.model.unload()  # type: ignore[operator]
        self.settings = self.settings.model_copy(update={"stage": "train"})
        self.inject(prepared)
        if selection is not None:
            give_selection(prepared.model, selection)

    def changed_base(self, model: nn.Module) -> dict[str, Tensor]:
        """The choice, for checkpoints of the second stage."""
        return {
            f"{name}.{key}": index
            for name, layer in chosen_layers(model).items()
            for key, index in layer.choices["default"].items()
        }

    def restore_base(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        for name, layer in chosen_layers(model).items():
            for key, index in layer.choices["default"].items():
                index.copy_(tensors[f"{name}.{key}"])


def chosen_layers(model: nn.Module) -> dict[str, ChosenLayer]:
    """Module name -> layer that knows the choice, in the model's order."""
    return {k: layer for k, layer in own_layers(model).items() if isinstance(layer, ChosenLayer)}


def select_dimensions(
    model: nn.Module, settings: SdLoraSettings, adapter: str = "default"
) -> Selection:
    """The choice after this adapter's warm-up, by mixer. Raises InputError where nothing moved."""
    layers: dict[str, Choice] = {}
    for layer in chosen_layers(model).values():
        if "dense" not in layer.values[adapter]:
            continue
        moved = layer.moved(adapter)
        if not bool(moved.sum() > 0):
            raise InputError(f"{layer.place} did not move in the warm-up; raise num_warmup_it")
        states = settings.divide_states(moved.shape[1]) if layer.has_states else None
        mixer = layer.place.partition(".gk_proj")[0].removesuffix(".log_decay")
        layers[mixer] = choose(moved, settings.divide_channels(len(moved)), states)
    if not layers:
        raise InputError("this model was not warmed up; begin with stage: warmup")
    return Selection(layers)


def give_selection(model: nn.Module, selection: Selection, adapter: str = "default") -> None:
    """Writes the choice into the layers of an adapter of stage train."""
    for layer in chosen_layers(model).values():
        for mixer, choice in selection.layers.items():
            if layer.place.startswith(f"{mixer}."):
                for key, index in layer.choices[adapter].items():
                    index.copy_(getattr(choice, key))
