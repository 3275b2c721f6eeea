"""PARAM_TRANSFORM: the scan's B_t and C_t scaled and shifted by trained values, the same for every
token: B'_t = s B_t + b, with s and b for each state, for each channel, or for each of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from ssm_train.peft.layers import Init, OwnLayer, SiteLayer, low_rank, start
from ssm_train.peft.tuner import OwnTuner, find_sites
from ssm_train.settings import Settings

SITES = {"B": "input_matrix", "C": "output_matrix"}
SHAPES = ("n", "d", "dn")
Matrix = Literal["B", "C"]


def read_shape(value: Any) -> Any:
    """Letters of dimensions in any order, as text or as a list -> one of SHAPES."""
    if not isinstance(value, (str, Sequence)):
        return value  # null; else an error of type
    shape = "".join(sorted(map(str, value)))
    if shape not in SHAPES:
        raise ValueError(
            "a shape is n (states), d (channels) or dn; values for each row (b) or token (l) of a "
            "batch cannot be trained"
        )
    return shape


Shape = Annotated[Literal["n", "d", "dn"] | None, BeforeValidator(read_shape)]


class ParamTransformSettings(Settings):
    """The keys of a PARAM_TRANSFORM JSON."""

    parameters: list[Matrix] = Field(default=["B", "C"], min_length=1)
    """Which of B and C."""
    scale_shape: Shape = None
    """Dimensions that the scale s has: n, d or dn; null: no scale."""
    bias_shape: Shape = None
    """The same for the bias b."""
    init: Init = "zero"
    """zero (s = 1, b = 0) leaves the function unchanged at step 0."""
    r: int | None = Field(default=None, ge=1)
    """Rank of a dn scale or bias as a product [d_inner, r] [r, n], zero at the start."""

    @model_validator(mode="after")
    def _trains_something(self) -> ParamTransformSettings:
        shapes = (self.scale_shape, self.bias_shape)
        if not any(shapes):
            raise ValueError(
                "scale_shape and bias_shape are both null, so nothing would train; set one to n, d "
                "or dn"
            )
        if self.r is not None and "dn" not in shapes:
            raise ValueError("r has a meaning only for a scale or a bias of shape dn")
        if self.r is not None and self.init == "random":
            raise ValueError("init random has no meaning with r: the product begins at zero")
        return self


class ParamTransformLayer(SiteLayer):
    """At the sites of B and C [B, T, n]: gives s B + b, [B, T, n] where s and b are [n], else
    [B, T, d, n]. Its values are s - 1 and b, so that weight decay pulls to the base."""

    prefix = "param_transform_"

    def create(self, settings: ParamTransformSettings) -> dict[str, Tensor]:
        shapes = {"scale": settings.scale_shape, "bias": settings.bias_shape}
        return {
            name: value
            for part, shape in shapes.items()
            if shape is not None
            for name, value in self._create_part(part, shape, settings).items()
        }

    def _create_part(
        self, part: str, shape: str, settings: ParamTransformSettings
    ) -> dict[str, Tensor]:
        A_log = self.owner.A_log
        channels, states = A_log.shape
        if shape == "dn" and settings.r is not None:
            left, right = low_rank((channels, states), settings.r, "r", A_log)
            return {f"{part}_left": left, f"{part}_right": right}
        sizes = {"n": (states,), "d": (channels, 1), "dn": (channels, states)}[shape]
        return {part: start(settings.init, sizes, A_log)}

    def _read_part(self, adapter: str, part: str) -> Tensor | None:
        values = self.values[adapter]
        if f"{part}_left" in values:
            return values[f"{part}_left"] @ values[f"{part}_right"]
        return values.get(part)

    def change(self, adapter: str, value: Any, *context: Tensor) -> Tensor:
        scale, bias = (self._read_part(adapter, part) for part in ("scale", "bias"))
        parts = [part for part in (scale, bias) if part is not None]
        if value.ndim == 3 and any(part.ndim == 2 for part in parts):
            value = value.unsqueeze(2)  # [B, T, 1, n]: from here on each channel has its own
        if scale is not None:
            value = value * (1 + scale)
        return value if bias is None else value + bias

    def obstacle(self, adapter: str) -> str | None:
        settings = self.settings[adapter]
        if settings.scale_shape == "n" and settings.bias_shape is None:
            return None
        return 'only a scale of shape "n", without a bias, fits rows of x_proj'

    def fold(self, adapter: str, sign: int) -> None:
        """A scale for each state is one for each row of x_proj."""
        mixer = self.owner
        rows = dict(zip(("dt", "B", "C"), mixer.slices["x_proj"].values(), strict=True))
        matrix = "B" if self.place.endswith(SITES["B"]) else "C"
        parts = dict(zip(rows, mixer.x_proj.weight.data.split(list(rows.values())), strict=True))
        if sign > 0:
            self.kept.append(parts[matrix].clone())
            parts[matrix] *= 1 + self.values[adapter]["scale"].detach()[:, None]
        else:
            parts[matrix].copy_(self.kept.pop())


class ParamTransformModel(OwnTuner):
    peft_name = "PARAM_TRANSFORM"
    prefix = ParamTransformLayer.prefix
    settings_class = ParamTransformSettings

    def choose(
        self, settings: ParamTransformSettings, model: nn.Module
    ) -> dict[str, type[OwnLayer]]:
        sites = [
            name
            for matrix in settings.parameters
            for name in find_sites(model, SITES[matrix], self.peft_name)
        ]
        return dict.fromkeys(sites, ParamTransformLayer)
