"""The settings of SD_LORA: what trains sparsely, what gets LoRA, how many channels and states."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ssm_train.adapters.modules import matches
from ssm_train.errors import near
from ssm_train.peft.dimensions import Counts, Division, Share, divide
from ssm_train.peft.sparse import AXIS_OF_CHANNELS
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

    @field_validator("num_freeze", "num_zero", mode="before")
    @classmethod
    def _keep_the_other_default(cls, value: Any, info: ValidationInfo) -> Any:
        default = cls.model_fields[str(info.field_name)].default.model_dump()
        return default | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _names_fit(self) -> SdLoraSettings:
        if self.target_modules and self.chooser not in self.target_modules:
            raise ValueError(
                f"target_modules: {self.chooser} is missing, whose warm-up chooses; add it"
            )
        if self.proj_lora_r is None and self.lora_targets:
            raise ValueError("lora_targets has no meaning without proj_lora_r; give a rank")
        for name in self.chosen_names:
            if name not in AXIS_OF_CHANNELS:
                raise ValueError(
                    f"target_modules: the channels of {name} are no rows or columns of it; "
                    + ("add it to lora_targets" if self.proj_lora_r else "set proj_lora_r")
                    + f", or name one of {', '.join(AXIS_OF_CHANNELS)}"
                )
        if isinstance(self.sdlora_alpha, dict):
            known = ["global", self.chooser, *self.default_sparse, *self.projections]
            for name in self.sdlora_alpha:
                if name not in known:
                    raise ValueError(f"sdlora_alpha: {name!r} is no target here{near(name, known)}")
        return self

    @model_validator(mode="after")
    def _adds_up(self) -> SdLoraSettings:
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
        if self.train_ratio is not None and not isinstance(freeze, float):
            raise ValueError(
                f"train_ratio is a fraction, but num_freeze's channel {freeze} is a number; give "
                "freeze_ratio too"
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
    def chosen_names(self) -> list[str]:
        """Linear layers that train in the chosen channels, in the second stage."""
        named = self.target_modules or [*self.default_sparse]
        return [name for name in named if name not in (*self.lora_names, "A_log")]

    @property
    def sparse_names(self) -> list[str]:
        """The same in this stage: none in the warm-up."""
        return [] if self.stage == "warmup" else self.chosen_names

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

    def divide_channels(self, size: int, what: str = "channels") -> Division:
        return divide(size, self.frozen_channels, self.zeroed_channels, what)

    def divide_states(self, size: int) -> Division:
        return divide(size, self.num_freeze.state, 0, "states")

    def alpha(self, place: str) -> float:
        """What the values on the cells of the module of this name are multiplied by."""
        if not isinstance(self.sdlora_alpha, dict):
            return self.sdlora_alpha
        own = (alpha for name, alpha in self.sdlora_alpha.items() if matches(place, [name]))
        return next(own, 1.0) * self.sdlora_alpha.get("global", 1.0)
