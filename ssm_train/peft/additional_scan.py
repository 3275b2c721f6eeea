"""Additional-scan (Yoshimura et al. 2024, MambaPEFT, arXiv 2411.03855): k more states in every
layer's scan, h_t [d, n + k], with trained decays A', inputs B'_t = W_B x_t, outputs C'_t = W_C x_t.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ssm_train.peft.layers import OwnLayer, SiteLayer, zeros
from ssm_train.peft.tuner import OwnTuner, find_sites
from ssm_train.settings import Settings


class AdditionalScanSettings(Settings):
    """The keys of an ADDITIONAL_SCAN JSON."""

    num_states: int = Field(default=6, ge=1)
    """States that each channel of each layer gets."""


class AdditionalScanLayer(SiteLayer):
    """At the site `extra_states`, whose value is (A_log [d, n], B [B, T, n], C [B, T, n]) and whose
    context is the scan's input x [B, T, d]: gives them with k more states.

    W_C is zero at the start, so that the function is unchanged while the new states already hold
    inputs: only W_C has a gradient in the first step, A' and W_B from the second on. A' begins as
    the decay of the first state, the slowest, as in the authors' configurations.
    """

    prefix = "additional_scan_"

    def create(self, settings: AdditionalScanSettings) -> dict[str, Tensor]:
        A_log = self.owner.A_log
        channels, k = len(A_log), settings.num_states
        B = torch.empty(k, channels, device=A_log.device)
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))  # as a linear layer
        return {
            "A_log": A_log.detach()[:, :1].float().repeat(1, k),
            "B": B,
            "C": zeros(k, channels, like=A_log),
        }

    def change(self, adapter: str, value: Any, *context: Tensor) -> Any:
        A_log, B, C = value
        (x,) = context
        added = self.values[adapter]
        weight = torch.cat([added["B"], added["C"]])
        more_B, more_C = F.linear(x, weight.to(x.dtype)).chunk(2, dim=-1)
        return (
            torch.cat([A_log, added["A_log"]], -1),
            torch.cat([B, more_B], -1),
            torch.cat([C, more_C], -1),
        )

    def obstacle(self, adapter: str) -> str | None:
        return None

    def fold(self, adapter: str, sign: int) -> None:
        """The layer becomes one with n + k states, in its weights and in the configuration."""
        mixer, added = self.owner, self.values[adapter]
        k = len(added["B"])
        dt, B, C = mixer.x_proj.weight.data.split(list(mixer.slices["x_proj"].values()))
        A_log = mixer.A_log.data
        if sign > 0:
            A_log = torch.cat([A_log, added["A_log"].to(A_log)], -1)
            B, C = (torch.cat([rows, added[name].to(rows)]) for name, rows in (("B", B), ("C", C)))
        else:
            A_log, B, C = A_log[:, :-k], B[:-k], C[:-k]
        mixer.A_log = nn.Parameter(A_log.detach().clone(), requires_grad=False)
        mixer.x_proj.weight = nn.Parameter(torch.cat([dt, B, C]).detach(), requires_grad=False)
        mixer.x_proj.out_features = len(mixer.x_proj.weight)
        mixer.ssm_state_size += sign * k
        mixer.config.state_size = mixer.ssm_state_size


class AdditionalScanModel(OwnTuner):
    peft_name = "ADDITIONAL_SCAN"
    prefix = AdditionalScanLayer.prefix
    settings_class = AdditionalScanSettings

    def choose(
        self, settings: AdditionalScanSettings, model: nn.Module
    ) -> dict[str, type[OwnLayer]]:
        return dict.fromkeys(find_sites(model, "extra_states", self.peft_name), AdditionalScanLayer)
