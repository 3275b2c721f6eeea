"""SSMPEFT: every document starts from a trained state h0 instead of zeros, and its convolution from
trained inputs before the first: h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t with h_0 = h0."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from ssm_train.peft.layers import Init, OwnLayer, SiteLayer, low_rank, start
from ssm_train.peft.tuner import OwnTuner, find_sites
from ssm_train.settings import Settings


class ScanSettings(Settings):
    """How the state of the scan begins."""

    type: Literal["init_state"] = "init_state"
    init: Init = "zero"
    """zero leaves the function unchanged at step 0."""
    hidden_dim: int | None = Field(default=None, ge=1)
    """The state as a product [d_inner, hidden_dim] [hidden_dim, n]; None: as it is."""


class InitialStateSettings(Settings):
    """The keys of a SSMPEFT JSON."""

    scan: ScanSettings | None = None
    """{type: init_state, init: zero|random}: a state [d_inner, n] of every layer."""
    conv_init_state: bool = False
    """Also the inputs [d_inner, d_conv - 1] before the first that the convolution sees."""
    conv_init_state_init: Init = "zero"
    """How those begin."""
    target_modules: list[str] | None = None
    """Kept for old configs: selective_scan_fn for the scan, conv1d for `conv_init_state`."""
    state_to_y: dict[str, Any] | None = None
    """Of old configs: an error that names the methods that have it now."""

    @model_validator(mode="after")
    def _trains_something(self) -> InitialStateSettings:
        if self.scan is None and not self.conv_init_state:
            raise ValueError(
                "scan and conv_init_state are both off, so nothing would train; set "
                '"scan": {"type": "init_state"} or "conv_init_state": true'
            )
        if self.scan is not None and self.scan.hidden_dim and self.scan.init == "random":
            raise ValueError(
                "scan: init random has no meaning with hidden_dim, which begins at zero"
            )
        if self.state_to_y is not None:
            raise ValueError(
                "state_to_y is a method of its own here: PARAM_TRANSFORM scales and shifts C, "
                "STATE_OFFSET_TUNING shifts the state; remove it"
            )
        meant = ["selective_scan_fn"] * (self.scan is not None) + ["conv1d"] * self.conv_init_state
        if self.target_modules is not None and sorted(self.target_modules) != sorted(meant):
            raise ValueError(
                f"target_modules {self.target_modules}: scan and conv_init_state say what trains, "
                f"here {meant}; leave it out"
            )
        return self


class InitialStateLayer(SiteLayer):
    """At the site `initial_state`: h0 [1, d, n] of Mamba-1, [1, heads, head size, n] of Mamba-2."""

    prefix = "initial_state_"

    def create(self, settings: InitialStateSettings) -> dict[str, Tensor]:
        assert settings.scan is not None
        init, hidden, like = settings.scan.init, settings.scan.hidden_dim, self.owner.A_log
        shape = (1, *state_shape(self.owner))
        if hidden is None:
            return {"state": start(init, shape, like)}
        left, right = low_rank(shape, hidden, "hidden_dim", like)
        return {"left": left, "right": right}

    def change(self, adapter: str, value: Any, *context: Tensor) -> Tensor:
        values = self.values[adapter]
        state = values["state"] if "state" in values else values["left"] @ values["right"]
        return state if value is None else value + state


class InitialWindowLayer(SiteLayer):
    """At the site `initial_window`: inputs [1, d, W - 1] before the first."""

    prefix = InitialStateLayer.prefix

    def create(self, settings: InitialStateSettings) -> dict[str, Tensor]:
        shape = (1, *window_shape(self.owner))
        return {"window": start(settings.conv_init_state_init, shape, self.owner.A_log)}

    def change(self, adapter: str, value: Any, *context: Tensor) -> Tensor:
        window = self.values[adapter]["window"]
        return window if value is None else value + window


def state_shape(mixer: Any) -> tuple[int, ...]:
    """Of one row: [d, n] of Mamba-1, [heads, head size, n] of Mamba-2."""
    if mixer.A_log.ndim == 1:
        return (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
    return tuple(mixer.A_log.shape)


def window_shape(mixer: Any) -> tuple[int, int]:
    """Of one row: [channels, W - 1] inputs of the convolution before the first."""
    return mixer.conv1d.in_channels, mixer.conv1d.kernel_size[0] - 1


class InitialStateModel(OwnTuner):
    peft_name = "SSMPEFT"
    prefix = InitialStateLayer.prefix
    settings_class = InitialStateSettings

    def choose(self, settings: InitialStateSettings, model: nn.Module) -> dict[str, type[OwnLayer]]:
        chosen: dict[str, type[OwnLayer]] = {}
        if settings.scan is not None:
            chosen |= dict.fromkeys(
                find_sites(model, "initial_state", self.peft_name), InitialStateLayer
            )
        if settings.conv_init_state:
            chosen |= dict.fromkeys(
                find_sites(model, "initial_window", self.peft_name), InitialWindowLayer
            )
        return chosen
