"""Layers of sparse dimension tuning: values on chosen channels and states, the choice as buffers
beside them, and LoRA on projections."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ssm_train.adapters.modules import autocasts, matches
from ssm_train.errors import InputError
from ssm_train.peft.dimensions import undecided_indices
from ssm_train.peft.layer_freeze import SiteDelta, is_named
from ssm_train.peft.layers import DeltaLayer, OwnLayer, SiteLayer, Values, zeros

FORGETS = 69.0
"""log of -A in a channel without memory: exp(-dt exp(69)) is 0 in fp32 for every dt above 1e-28,
and 1 at dt = 0, so that padding still passes the state."""

AXIS_OF_CHANNELS = {
    **dict.fromkeys(("in_proj_x", "in_proj_z", "dt_proj", "gk_proj.1"), 0),
    **dict.fromkeys(("out_proj", "x_proj_dt", "x_proj_B", "x_proj_C"), 1),
}
"""Module -> the axis of its weight [out, in] that counts the channels of its mixer."""


class ChosenLayer(OwnLayer):
    """A layer that knows the chosen dimensions, and may help to choose them."""

    has_states = False
    """Whether states are chosen within channels."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "prefix"):
            cls.other_param_names = (f"{cls.prefix}choice",)

    def __init__(self, base_layer: nn.Module, owner: nn.Module, place: str) -> None:
        super().__init__(base_layer, owner, place)
        self.add_module(self.other_param_names[0], nn.ModuleDict())
        self.decided: set[str] = set()

    @property
    def choices(self) -> Any:
        """adapter -> BufferDict of the indices of `dimensions.Choice` that this layer needs."""
        return getattr(self, self.other_param_names[0])

    def undecided(self, settings: Any) -> dict[str, Tensor]:
        """Placeholders for the indices."""
        raise NotImplementedError

    def add(self, adapter: str, settings: Any) -> None:
        super().add(adapter, settings)
        self.choices[adapter] = BufferDict(self.undecided(settings), persistent=True)
        self.decided.discard(adapter)

    def choice(self, adapter: str) -> Any:
        """The indices by name. Raises InputError while there are none."""
        indices = self.choices[adapter]
        if adapter not in self.decided:  # asked once, as the answer waits for the device
            if any(bool((index < 0).any()) for index in indices.values()):
                raise InputError(
                    f"{self.place}: no dimensions are chosen yet; a warm-up (stage: warmup) "
                    "chooses them, or load an adapter that has them"
                )
            self.decided.add(adapter)
        return indices

    def alpha(self, adapter: str) -> float:
        return self.settings[adapter].alpha(self.place)

    def moved(self, adapter: str) -> Tensor:
        """Squared movement in the warm-up, [channels, states or inputs]."""
        raise NotImplementedError


class DecayLayer(ChosenLayer, SiteLayer):
    """At the site `log_decay`: A_log [d, n] (Mamba-2: [heads]) with a dense delta in the warm-up,
    then with values on the chosen cells, and without memory in the zeroed channels."""

    prefix = "sd_lora_"

    @property
    def has_states(self) -> bool:  # type: ignore[override]
        return self.owner.A_log.ndim == 2

    def create(self, settings: Any) -> dict[str, Tensor]:
        A_log = self.owner.A_log
        if settings.stage == "warmup":
            return {"dense": zeros(*A_log.shape, like=A_log)}
        states = (settings.divide_states(A_log.shape[1]).train,) if self.has_states else ()
        return {"cells": zeros(settings.divide_channels(len(A_log)).train, *states, like=A_log)}

    def undecided(self, settings: Any) -> dict[str, Tensor]:
        A_log = self.owner.A_log
        channels = settings.divide_channels(len(A_log), "channels" if self.has_states else "heads")
        states = settings.divide_states(A_log.shape[1]) if self.has_states else None
        if channels.zero and states is None:
            raise InputError(
                "num_zero: heads of Mamba-2 cannot lose their memory here; set its channel to 0"
            )
        if settings.stage == "warmup":
            return {}
        found = {"channels": undecided_indices(channels.train, like=A_log)}
        if states is not None:
            found["states"] = undecided_indices(channels.train, states.train, like=A_log)
        return found | (
            {"zeroed": undecided_indices(channels.zero, like=A_log)} if channels.zero else {}
        )

    def alpha(self, adapter: str) -> float:
        return self.settings[adapter].alpha("A_log")

    def obstacle(self, adapter: str) -> str | None:
        return None

    def moved(self, adapter: str) -> Tensor:
        dense = self.values[adapter]["dense"].detach().square()
        return dense if self.has_states else dense[:, None]

    def change(self, adapter: str, value: Any, *context: Tensor) -> Tensor:
        values, alpha = self.values[adapter], self.alpha(adapter)
        if "dense" in values:
            return value + alpha * values["dense"]
        choice = self.choice(adapter)
        cells = (choice["channels"],)
        if self.has_states:
            cells = (choice["channels"][:, None], choice["states"])  # type: ignore[assignment]
        value = value.index_put(cells, value[cells] + alpha * values["cells"])
        if "zeroed" in choice:
            value = value.index_fill(0, choice["zeroed"], FORGETS)
        return value

    def fold(self, adapter: str, sign: int) -> None:
        """Taken out in the reverse order, values are what they were, in zeroed channels too."""
        A_log = self.owner.A_log
        if sign > 0:
            self.kept.append(A_log.data)
            A_log.data = self.change(adapter, A_log.data).detach()
        else:
            A_log.data = self.kept.pop().to(A_log.device)


class ProjectionLayer(ChosenLayer, DeltaLayer):
    """A linear layer W [out, in] with what the settings give it: y = (W + delta) x + s B A x +
    alpha P x. P has the rows, or the columns, of the chosen channels; in the warm-up of a layer
    that chooses it is dense."""

    prefix = DecayLayer.prefix

    @property
    def axis(self) -> int:
        """The axis of W that counts channels."""
        return next(a for name, a in AXIS_OF_CHANNELS.items() if matches(self.place, [name]))

    def create(self, settings: Any) -> dict[str, Tensor]:
        base: Any = self.base_layer
        values = {
            name: zeros(*parameter.shape, like=parameter)
            for name, parameter in base.named_parameters(recurse=False)
            if is_named(f"{self.place}.{name}", settings.finetune_parameters or [])
        }
        if matches(self.place, settings.dense_names):
            values["dense"] = zeros(*base.weight.shape, like=base.weight)
        if matches(self.place, settings.sparse_names):
            shape = list(base.weight.shape)
            shape[self.axis] = settings.divide_channels(shape[self.axis]).train
            values["cells"] = zeros(*shape, like=base.weight)
        if matches(self.place, settings.lora_names):
            rows, columns = base.weight.shape
            A = torch.empty(settings.proj_lora_r, columns, device=base.weight.device)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as PEFT's
            values |= {"lora_A": A, "lora_B": zeros(rows, settings.proj_lora_r, like=A)}
        return values

    def undecided(self, settings: Any) -> dict[str, Tensor]:
        if not matches(self.place, settings.sparse_names):
            return {}
        weight: Any = self.base_layer.weight
        channels = settings.divide_channels(weight.shape[self.axis])
        return {"channels": undecided_indices(channels.train, like=weight)}

    def moved(self, adapter: str) -> Tensor:
        return self.values[adapter]["dense"].detach().square()

    def deltas(self, adapter: str) -> Values:
        parameters = dict(self.base_layer.named_parameters(recurse=False))
        return {k: value for k, value in self.values[adapter].items() if k in parameters}

    def forward(self, x: Tensor, *inputs: Any, **options: Any) -> Any:
        y = super().forward(x, *inputs, **options)
        for adapter in self.active():
            y = self._add(adapter, x, y)
        return y

    def _add(self, adapter: str, x: Tensor, y: Any) -> Any:
        values, alpha = self.values[adapter], self.alpha(adapter)
        if not autocasts(x):
            x = x.float()
        if "lora_A" in values:
            dropped = F.dropout(x, self.settings[adapter].proj_lora_dropout, self.training)
            update = F.linear(F.linear(dropped, values["lora_A"]), values["lora_B"])
            y = y + (self.settings[adapter].lora_scale * update).to(y.dtype)
        if "dense" in values:
            y = y + (alpha * F.linear(x, values["dense"])).to(y.dtype)
        if "cells" in values:
            channels = self.choice(adapter)["channels"]
            if self.axis == 1:
                chosen = x.index_select(-1, channels)
                y = y + (alpha * F.linear(chosen, values["cells"])).to(y.dtype)
            else:
                rows = alpha * F.linear(x, values["cells"])
                y = y.index_add(-1, channels, rows.to(y.dtype))
        return y

    def fold(self, adapter: str, sign: int) -> None:
        super().fold(adapter, sign)
        values, alpha = self.values[adapter], sign * self.alpha(adapter)
        weight: Any = self.base_layer.weight
        with torch.no_grad():
            moved = weight.float()
            if "lora_A" in values:
                scale = sign * self.settings[adapter].lora_scale
                moved = moved + scale * (values["lora_B"] @ values["lora_A"])
            if "dense" in values:
                moved = moved + alpha * values["dense"]
            if "cells" in values:
                channels = self.choice(adapter)["channels"]
                moved = moved.index_add(self.axis, channels, alpha * values["cells"])
            weight.copy_(moved)


class ForgetLayer(ChosenLayer, SiteLayer):
    """At the site `forgotten` of GLA: a mask [key channels] of those without memory."""

    prefix = DecayLayer.prefix

    def create(self, settings: Any) -> dict[str, Tensor]:
        return {}

    def undecided(self, settings: Any) -> dict[str, Tensor]:
        zeroed = settings.divide_channels(self.owner.key_dim_per_group).zero
        return {"zeroed": undecided_indices(zeroed, like=self.owner.q_proj.weight)}

    def change(self, adapter: str, value: Any, *context: Tensor) -> Tensor:
        zeroed = self.choice(adapter)["zeroed"]
        mask = torch.zeros(self.owner.key_dim_per_group, dtype=torch.bool, device=zeroed.device)
        mask = mask.index_fill(0, zeroed, True)
        return mask if value is None else value | mask


class FinetunedSite(SiteDelta):
    """A mixer's own parameter that trains in full."""

    prefix = DecayLayer.prefix
