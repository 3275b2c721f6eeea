"""State-offset tuning (Kang et al. 2025, arXiv 2503.03499): a trained offset of the state at every
step, y_t += silu(z_t) sum_n C_t[n] p[d, n]; or of the output, y_t += silu(z_t) p[d]."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from ssm_train.peft.layers import Init, OwnLayer, SiteLayer, low_rank, start
from ssm_train.peft.tuner import OwnTuner, find_sites
from ssm_train.settings import Settings


class StateOffsetSettings(Settings):
    """The keys of a STATE_OFFSET_TUNING JSON."""

    tuning_mode: Literal["STATE_OFFSET_TUNING", "OUTPUT_TUNING"] = "STATE_OFFSET_TUNING"
    """Offset of the state [d_inner, n] or of the output [d_inner]."""
    init: Init = "zero"
    """zero leaves the function unchanged at step 0."""
    r: int | None = Field(default=None, ge=1)
    """Rank of the state's offset as a product [d_inner, r] [r, n], zero at the start."""

    @model_validator(mode="after")
    def _rank_of_a_matrix(self) -> StateOffsetSettings:
        if self.r is not None and self.tuning_mode == "OUTPUT_TUNING":
            raise ValueError("r has no meaning for OUTPUT_TUNING, whose offset is a vector")
        if self.r is not None and self.init == "random":
            raise ValueError("init random has no meaning with r: the product begins at zero")
        return self


class StateOffsetLayer(SiteLayer):
    """At the site `offset`, whose context is C [B, T, n]: gives an offset of y [B, T, d] before
    the gate."""

    prefix = "state_offset_"

    def create(self, settings: StateOffsetSettings) -> dict[str, Tensor]:
        A_log = self.owner.A_log
        channels, states = A_log.shape
        if settings.tuning_mode == "OUTPUT_TUNING":
            return {"output": start(settings.init, (channels,), A_log)}
        if settings.r is None:
            return {"state": start(settings.init, (channels, states), A_log)}
        left, right = low_rank((channels, states), settings.r, "r", A_log)
        return {"left": left, "right": right}

    def change(self, adapter: str, value: Any, *context: Tensor) -> Tensor:
        (C,) = context
        values = self.values[adapter]
        if "output" in values:
            offset = values["output"]
        elif "state" in values:
            offset = C.float() @ values["state"].mT
        else:
            offset = C.float() @ values["right"].mT @ values["left"].mT
        return offset if value is None else value + offset


class StateOffsetModel(OwnTuner):
    peft_name = "STATE_OFFSET_TUNING"
    prefix = StateOffsetLayer.prefix
    settings_class = StateOffsetSettings

    def choose(self, settings: StateOffsetSettings, model: nn.Module) -> dict[str, type[OwnLayer]]:
        return dict.fromkeys(find_sites(model, "offset", self.peft_name), StateOffsetLayer)
