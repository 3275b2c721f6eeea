"""The mixers of Mamba-1 and Mamba-2: what happens to one layer's input, for every kind of batch.

They call their sub-modules and our kernels only, never a weight past its module's forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba import modeling_mamba as stock1
from transformers.models.mamba2 import modeling_mamba2 as stock2

from ssm_train.adapters import modules, ssd_triton
from ssm_train.adapters.base import KernelChoice
from ssm_train.kernels import implementation
from ssm_train.kernels.again import made_again
from ssm_train.kernels.rms_norm import gated_rms_norm, rms_norm
from ssm_train.kernels.selective_scan import selective_scan
from ssm_train.kernels.ssd import ssd


class CachedMixer(modules.Part):
    """What the two mixers share: the dtype check, padding, the convolution and the cache."""

    part = "mixer"

    fp32_names: tuple[str, ...]
    sites: tuple[str, ...]
    """Names of its `modules.Site` modules, of these:"""
    log_decay: modules.Site
    skip: modules.Site
    step_bias: modules.Site
    input_matrix: modules.Site
    output_matrix: modules.Site
    extra_states: modules.Site
    initial_window: modules.Site
    initial_state: modules.Site
    initial_context: modules.Site
    offset: modules.Site
    dtype_checked = False
    kernels: KernelChoice = "auto"
    """What runs tensors on a GPU; others always take the reference."""

    def _check_dtype(self: Any) -> None:
        if not self.dtype_checked:
            modules.check_fp32(self, self.fp32_names)
            self.dtype_checked = True

    def _find_context(self: Any, hidden: Tensor, cache: Any) -> tuple[Tensor | None, Tensor | None]:
        """What comes before the first token of the mixer's input [B, T, H]: the window of the
        convolution [B, d, W - 1] and the state, from the cache if it has them, else the initial
        ones of one row for all; None: zeros. To be called before the convolution fills its cache.
        """
        if cache is not None and cache.has_previous_state(self.layer_idx):
            past = cache.layers[self.layer_idx]
            inputs = past.conv_states[0]  # [B, d, >= W - 1]
            before = self.conv1d.kernel_size[0] - 1
            return inputs[..., inputs.shape[-1] - before :], past.recurrent_states[0]
        return self.initial_context((self.initial_window(None), self.initial_state(None)), hidden)

    def _convolve(
        self: Any,
        x: Tensor,
        real: Tensor | None,
        cache: Any,
        cu_seqlens: Tensor | None,
        window: Tensor | None = None,
    ) -> Tensor:
        """Convolution and activation of x [B, T, d] after the window, cached or initial."""
        if real is not None:
            x = x.masked_fill(~real, 0)
        width = self.conv1d.kernel_size[0]
        inputs = x  # what the cache takes
        if window is not None:
            if real is not None:
                window, x = lay_window(window, x, real)
            inputs = torch.cat([window.mT.to(x.dtype).expand(len(x), -1, -1), x], 1)
        fused = "silu" if self.activation in ("silu", "swish") else None
        y, _ = self.conv1d(x, window, cu_seqlens, activation=fused)
        if cache is not None:  # after the convolution: the cache is updated in place
            cache.update_conv_state(inputs.mT, self.layer_idx, conv_kernel_size=width)
        return y if fused else self.act(y)


class MambaMixer(CachedMixer, stock1.MambaMixer):
    """Mamba-1: convolution, then a scan whose step sizes, B and C come from its own input."""

    fp32_names = ("A_log", "D", "dt_proj.bias")
    sites = (
        *("log_decay", "skip", "input_matrix", "output_matrix", "extra_states"),
        *("initial_window", "initial_state", "initial_context", "offset"),
    )

    @property
    def slices(self) -> dict[str, dict[str, int]]:
        """Projection -> the slices of its rows, in order."""
        d, n = self.intermediate_size, self.ssm_state_size
        return {
            "in_proj": {"in_proj_x": d, "in_proj_z": d},
            "x_proj": {"x_proj_dt": self.time_step_rank, "x_proj_B": n, "x_proj_C": n},
        }

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, H]
        cache_params: Any = None,
        attention_mask: Tensor | None = None,  # [B, >= T], 0 on padding; the last T columns count
        cu_seqlens: Tensor | None = None,  # [N + 1], packed documents, B == 1
        **_: Any,
    ) -> Tensor:
        self._check_dtype()
        real = real_positions(hidden_states, attention_mask)
        window, past = self._find_context(hidden_states, cache_params)
        x, z = modules.project(hidden_states, self.in_proj)[0].chunk(2, dim=-1)  # [B, T, d]
        x = self._convolve(x, real, cache_params, cu_seqlens, window)
        dt, B, C = modules.project(x, self.x_proj)[0].split(
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1
        )
        if real is None:
            dt = modules.recompute_in(self.dt_proj, self.dt_proj, dt)  # [B, T, d] fp32
        else:  # a step of size 0: the state passes through padding unchanged
            dt = self.dt_proj(dt).masked_fill(~real, -torch.inf)
        with torch.autocast(x.device.type, enabled=False):
            A_log, B, C = self.extra_states((self.log_decay(self.A_log), B, C), x)
            B, C = self.input_matrix(B), self.output_matrix(C)  # [B, T, n], or [B, T, d, n]
            with made_again(x, dt):
                y, state = selective_scan(
                    x,
                    dt,
                    -torch.exp(A_log),
                    B,
                    C,
                    D=self.skip(self.D),
                    z=z,
                    dt_softplus=True,
                    kernels=self.kernels,
                    initial_state=past,
                    output_final_state=cache_params is not None,
                    cu_seqlens=cu_seqlens,
                )
            if (offset := self.offset(None, C)) is not None:  # [B, T, d]
                y = y + (F.silu(z.float()) * offset).to(y.dtype)
        if cache_params is not None:
            cache_params.update_recurrent_state(state, self.layer_idx)
        return self.out_proj(y)


class Mamba2Mixer(CachedMixer, stock2.Mamba2Mixer):
    """Mamba-2: all projections at once, convolution, the SSD with one decay a head, gated norm."""

    fp32_names = ("A_log", "D", "dt_bias")
    sites = (
        *("log_decay", "skip", "step_bias"),
        *("initial_window", "initial_state", "initial_context"),
    )

    @property
    def slices(self) -> dict[str, dict[str, int]]:
        """Projection -> the slices of its rows, in order."""
        d, n = self.intermediate_size, self.n_groups * self.ssm_state_size
        names = ("in_proj_z", "in_proj_x", "in_proj_B", "in_proj_C", "in_proj_dt")
        return {"in_proj": dict(zip(names, (d, d, n, n, self.num_heads), strict=True))}

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, H]
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        self._check_dtype()
        real = real_positions(hidden_states, attention_mask)
        z, xBC, dt = modules.project(hidden_states, self.in_proj)[0].split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        window, past = self._find_context(hidden_states, cache_params)
        xBC = self._convolve(xBC, real, cache_params, cu_seqlens, window)
        groups = self.n_groups * self.ssm_state_size
        x, B, C = xBC.split([self.intermediate_size, groups, groups], dim=-1)
        # The bias promotes dt to fp32 before the softplus.
        bias = self.step_bias(self.dt_bias)
        dt = step_sizes(dt + bias, real, *self.time_step_limit)  # [B, T, heads]
        with torch.autocast(x.device.type, enabled=False):
            inputs = (
                x.unflatten(-1, (self.num_heads, self.head_dim)),
                dt,
                -torch.exp(self.log_decay(self.A_log)),
                B.unflatten(-1, (self.n_groups, self.ssm_state_size)),
                C.unflatten(-1, (self.n_groups, self.ssm_state_size)),
            )
            skip, state = self.skip(self.D), past
            if self._steps_in_place(hidden_states, cache_params) and past is not None:
                from ssm_train.kernels.ssd.triton import ssd_step

                y = ssd_step(*inputs, skip, past)
            else:
                plain = ssd_triton.implementation(self.kernels, x.device) == "reference"
                with made_again(xBC):
                    y, state = (ssd if plain else ssd_triton.ssd_triton)(
                        *inputs,
                        D=skip,
                        initial_state=past,
                        output_final_state=cache_params is not None,
                        cu_seqlens=cu_seqlens,
                    )
        if cache_params is not None:
            cache_params.update_recurrent_state(state, self.layer_idx)
        return modules.project(self.norm(y.flatten(-2), z), self.out_proj)[0]

    def _steps_in_place(self: Any, hidden: Tensor, cache: Any) -> bool:
        """Whether Triton may take a step of hidden [B, T, H] in the cached state itself."""
        stays = getattr(cache, "states_stay", False)  # see `decode_step`
        on_gpu = implementation(self.kernels, hidden.device) == "triton"
        return stays and on_gpu and hidden.shape[1] == 1


def real_positions(hidden: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """[B, T, 1], False on padding, for hidden [B, T, H]; None when everything is real."""
    if attention_mask is None:
        return None
    return attention_mask[:, -hidden.shape[1] :, None].bool()


def lay_window(window: Tensor, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Lays the window right before the first real token of each row, or at the end of one without.

    window [B or 1, d, W - 1]; x [B, T, d], zero on padding; real [B, T, 1]. Returns the windows
    before the rows [B, d, W - 1], and x with what of the window falls on its padding on the left.
    """
    before, rows = window.shape[-1], x.shape[0]
    laid = torch.cat([x.new_zeros(rows, before, x.shape[-1]), x], 1)  # [B, W - 1 + T, d]
    tokens = real.squeeze(-1).int()  # [B, T]
    padding = torch.where(tokens.any(1), tokens.argmax(1), x.shape[1])  # [B], before the first
    places = padding[:, None] + torch.arange(before, device=x.device)  # [B, W - 1]
    values = window.mT.to(x.dtype).expand(rows, -1, -1)
    laid = laid.scatter(1, places[..., None].expand_as(values), values)
    return laid[:, :before].mT, laid[:, before:]


def step_sizes(
    raw: Tensor, real: Tensor | None, least: float = 0.0, most: float = float("inf")
) -> Tensor:
    """softplus, clamped, and 0 at padding, where the state then passes through unchanged."""
    dt = F.softplus(raw)
    if least > 0 or most < float("inf"):
        dt = dt.clamp(least, most)
    return dt if real is None else dt.masked_fill(~real, 0)


class RMSNorm:
    """Norm of [..., D] in fp32, for every such class of transformers."""

    kernels: KernelChoice = "auto"

    def forward(self: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        """The norm of their sum, in the dtype of the products that read it, and with a residual
        the sum in its dtype."""
        return rms_norm(
            hidden_states, self.weight, self.variance_epsilon,
            residual=residual, dtype=modules.compute_dtype(hidden_states), kernels=self.kernels,
        )  # fmt: skip


class GatedRMSNorm:
    """Norm of x * silu(gate) in fp32, group by group (Mamba-2's groups of B and C).

    mamba_ssm normalises per group; transformers 5.17 takes all groups together.
    """

    kernels: KernelChoice = "auto"
    group_size: int

    def forward(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(
            hidden_states,
            gate,
            self.weight,
            self.variance_epsilon,
            gate_first=True,
            group_size=self.group_size,
            kernels=self.kernels,
        )
