"""Affix-tuning (Yoshimura et al. 2024, MambaPEFT, arXiv 2411.03855): trained tokens before every
document at each mixer's input, whose outputs are dropped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ssm_train.peft.initial_state import state_shape, window_shape
from ssm_train.peft.layers import OwnLayer, SiteLayer, start
from ssm_train.peft.tuner import OwnTuner, find_sites
from ssm_train.settings import Settings


class AffixTuningSettings(Settings):
    """The keys of an AFFIX_TUNING JSON."""

    num_virtual_tokens: int = Field(default=1, ge=1)
    """Tokens before each document, in every layer."""


class Past:
    """The cache of one layer: its convolution's last inputs [1, d, W - 1] and its state [1, ...].
    Unlike a decoding cache, it passes gradients."""

    def __init__(self, layer_idx: int, window: Tensor, state: Tensor) -> None:
        held = SimpleNamespace(conv_states=[window], recurrent_states=[state])
        self.layers = {layer_idx: held}

    def has_previous_state(self, layer_idx: int) -> bool:
        return True

    def update_conv_state(self, inputs: Tensor, layer_idx: int, conv_kernel_size: int) -> None:
        held = self.layers[layer_idx].conv_states
        seen = torch.cat([held[0], inputs], -1)
        held[0] = seen[..., seen.shape[-1] - conv_kernel_size + 1 :]

    def update_recurrent_state(self, state: Tensor, layer_idx: int) -> None:
        self.layers[layer_idx].recurrent_states[0] = state


class AffixLayer(SiteLayer):
    """At the site `initial_context`, whose value is (window, state) before the first token and
    whose context is the mixer's input: gives both as m more tokens [m, hidden] leave them.

    A mixer is a recurrence, so this equals inserting the tokens before each document and dropping
    their outputs, at the cost of one row of m tokens a forward.
    """

    prefix = "affix_tuning_"

    def create(self, settings: AffixTuningSettings) -> dict[str, Tensor]:
        shape = (settings.num_virtual_tokens, self.owner.in_proj.in_features)
        return {"tokens": start("random", shape, self.owner.A_log)}

    def change(self, adapter: str, value: Any, *context: Tensor) -> tuple[Tensor, Tensor]:
        mixer, (hidden,) = self.owner, context
        shapes = (window_shape(mixer), state_shape(mixer))
        window, state = (
            mixer.A_log.new_zeros(1, *shape) if before is None else before
            for before, shape in zip(value, shapes, strict=True)
        )
        past = Past(mixer.layer_idx, window, state)
        tokens = self.values[adapter]["tokens"][None].to(hidden.dtype)
        # Its own forward, not a call, which would run hooks of the mixer within the mixer. With a
        # past it does not come here again.
        mixer.forward(tokens, cache_params=past)
        held = past.layers[mixer.layer_idx]
        return held.conv_states[0], held.recurrent_states[0]


class AffixTuningModel(OwnTuner):
    """The function is another one at step 0, whatever the tokens are: see `changes_function`."""

    peft_name = "AFFIX_TUNING"
    prefix = AffixLayer.prefix
    settings_class = AffixTuningSettings
    changes_function = "documents start from the state that the affix leaves, not from zeros"

    def choose(self, settings: AffixTuningSettings, model: nn.Module) -> dict[str, type[OwnLayer]]:
        return dict.fromkeys(find_sites(model, "initial_context", self.peft_name), AffixLayer)
