"""The layers of GLA: what happens to one layer's input, for every kind of batch.

They call their sub-modules and kernels only, never a weight past its module's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fla.layers import gla as fla_layer
from fla.layers.utils import get_layer_cache, update_layer_cache
from fla.modules import FusedRMSNormGated as FlaFusedRMSNormGated
from fla.modules import GatedMLP as FlaGatedMLP
from fla.modules import RMSNorm as FlaRMSNorm
from fla.modules import ShortConvolution as FlaShortConvolution
from fla.modules.activations import ACT2FN
from fla.ops.gla import chunk_gla, fused_recurrent_gla
from torch import Tensor, nn

from ssm_train.adapters import modules
from ssm_train.adapters.base import KernelChoice
from ssm_train.adapters.gla_triton import Chunks, packed_gla
from ssm_train.kernels.causal_conv1d import causal_conv1d
from ssm_train.kernels.gla import gla
from ssm_train.kernels.gla.triton import gla_step
from ssm_train.kernels.pointwise import swiglu
from ssm_train.kernels.rms_norm import gated_rms_norm, rms_norm

# fla keeps an activation as a function (Triton or torch.compile); these are the same in PyTorch.
ACTIVATIONS: dict[Callable[..., Tensor], Callable[[Tensor], Tensor]] = {
    ACT2FN["relu"]: F.relu,
    ACT2FN["sigmoid"]: torch.sigmoid,
    ACT2FN["logsigmoid"]: F.logsigmoid,
    ACT2FN["swish"]: F.silu,
    ACT2FN["sqrelu"]: lambda x: F.relu(x).square(),
    ACT2FN["gelu"]: lambda x: F.gelu(x, approximate="tanh"),
}


def uses_triton(module: nn.Module, x: Tensor) -> bool:
    """fla's kernels for tensors on a GPU, unless the model was told to use the reference."""
    return x.is_cuda and module.kernels != "reference"


class RMSNorm(FlaRMSNorm):
    kernels: KernelChoice = "auto"

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Norm of `x + residual`, in the dtype of the products that read it; with `prenorm` also
        that sum, in the residual's."""
        options: dict[str, Any] = {"dtype": modules.compute_dtype(x), "kernels": self.kernels}
        if residual is None:
            y, total = rms_norm(x, self.weight, self.eps, **options), x
        else:
            y, total = rms_norm(x, self.weight, self.eps, residual=residual, **options)
        return (y, total) if prenorm else y


class FusedRMSNormGated(FlaFusedRMSNormGated):
    kernels: KernelChoice = "auto"

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """Norm of `x` times silu(g): both [..., D]."""
        assert self.activation in ("swish", "silu"), self.activation
        return gated_rms_norm(x, g, self.weight, self.eps, kernels=self.kernels)


class ShortConvolution(FlaShortConvolution):
    kernels: KernelChoice = "auto"

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        cache: Tensor | None = None,  # [N, D, W]: the last W inputs
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if uses_triton(self, x):
            return super().forward(
                x, cache=cache, output_final_state=output_final_state, cu_seqlens=cu_seqlens
            )
        y, window = causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            activation=None if self.activation is None else "silu",
            initial_window=None if cache is None else cache[..., 1:],
            output_final_window=output_final_state,
            cu_seqlens=cu_seqlens,
        )
        # fla's layout has one input more than the next step needs: the oldest, which nobody reads.
        return y, None if window is None else F.pad(window, (1, 0))


class GatedMLP(modules.Part, FlaGatedMLP):  # type: ignore[misc]
    part = "mlp"
    kernels: KernelChoice = "auto"

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """SwiGLU through the down_proj module, whose LoRA stock fla's fused form would miss."""
        gate, up = modules.project(x, self.gate_proj, self.up_proj)
        return modules.project(swiglu(gate, up, kernels=self.kernels), self.down_proj)[0]


class GatedLinearAttention(modules.Part, fla_layer.GatedLinearAttention):  # type: ignore[misc]
    """Projections, short convolutions, the recurrence o_t = S_t^T q_t with
    S_t = diag(exp g_t) S_(t-1) + k_t v_t^T in each head, norm and output gate."""

    part = "mixer"
    kernels: KernelChoice = "auto"
    dtype_checked = False
    sites = ("forgotten",)
    """Names of its `modules.Site` modules."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D]
        attention_mask: Tensor | None = None,  # [B, >= T], 0 on padding; its last T columns count
        past_key_values: Any = None,
        cu_seqlens: Tensor | None = None,  # [N + 1], packed documents, B == 1
        chunks: Chunks | None = None,  # of the same documents, for the kernels on a GPU
        **_: Any,
    ) -> tuple[Tensor, None, Any]:
        if not self.dtype_checked:
            modules.check_fp32(self, ("gk_proj.1.bias",))
            self.dtype_checked = True
        length, caching = hidden_states.shape[1], past_key_values is not None
        cached = get_layer_cache(self, past_key_values) or {}
        real = None  # [B, T, 1]
        if attention_mask is not None and cu_seqlens is None:
            real = attention_mask[:, -length:, None].bool()

        projections = [self.q_proj, self.k_proj, self.v_proj, self.gk_proj[0]]
        if self.use_output_gate:
            projections.append(self.g_proj)
        q, k, v, decay, *gate = modules.project(hidden_states, *projections)
        inputs: tuple[Tensor, ...] = q, k, v
        windows = None
        if self.use_short_conv:
            if real is not None:
                inputs = tuple(x.masked_fill(~real, 0) for x in inputs)
            convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            before = cached.get("conv_state") or (None, None, None)
            convolved = [
                convolution(x, window, caching, cu_seqlens)
                for convolution, x, window in zip(convolutions, inputs, before, strict=True)
            ]
            inputs, windows = zip(*convolved, strict=True)
        q, k, v = inputs
        q = self._heads(q, self.head_k_dim)  # [B, T, H, K]
        k = self._share(self._heads(k, self.head_k_dim))
        v = self._share(self._heads(v, self.head_v_dim))
        if self.feature_map_fn is not None:
            feature_map = ACTIVATIONS[self.feature_map_fn]
            q, k = feature_map(q), feature_map(k)
        if chunks is None:
            g = self._log_decay(decay)  # [B, T, H, K] fp32
        else:
            g = modules.recompute_in(self.gk_proj[1], self._log_decay, decay)
        if real is not None:  # the state passes through padding unchanged
            k = k.masked_fill(~real[..., None], 0)
            g = g.masked_fill(~real[..., None], 0)

        own = None  # [B, T, H, V]
        if (forgotten := self.forgotten(None)) is not None:  # [H * K] key channels
            k, own = self._forget(q, k, v, forgotten)
        past = cached.get("recurrent_state")
        in_place = getattr(past_key_values, "states_stay", False)  # see `decode_step`
        if chunks is not None and not caching and past is None and uses_triton(self, q):
            o, state = packed_gla(q, k, v, g, chunks), None
        elif length == 1 and in_place and past is not None and uses_triton(self, q):
            o, state = gla_step(q, k, v, g, past), past
        else:
            o, state = self._recur(q, k, v, g, past, caching, cu_seqlens)
        o = o if own is None else o + own
        update_layer_cache(
            self,
            past_key_values,
            recurrent_state=state,
            conv_state=windows,
            offset=length,
        )
        (output,) = modules.project(self._gate_output(o, *gate), self.o_proj)
        return output, None, past_key_values

    def _forget(self, q: Tensor, k: Tensor, v: Tensor, forgotten: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without the channels that have no memory, and what those contribute at their own
        step, K ** -0.5 (q . k) v over them; a gate of minus infinity does both, but overflows."""
        mask = self._heads(forgotten, self.head_k_dim)  # [H, K]
        mask = mask.repeat_interleave(self.num_kv_groups, dim=0)
        weight = (q.float() * k.float() * mask).sum(-1, keepdim=True) * self.head_k_dim**-0.5
        return k.masked_fill(mask, 0), (weight * v.float()).to(v.dtype)

    def _recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        state: Tensor | None,  # [N, H, K, V] fp32
        output_final_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {
            "initial_state": state,
            "output_final_state": output_final_state,
            "cu_seqlens": cu_seqlens,
        }
        if not uses_triton(self, q):
            return gla(q, k, v, g, **options)
        if q.shape[1] == 1:
            return fused_recurrent_gla(q, k, v, g, **options)
        return chunk_gla(q, k, v, g, **options)

    def _log_decay(self, low_rank: Tensor) -> Tensor:
        """Per key channel, <= 0, in fp32: near 0 a bf16 gate would forget the long memory."""
        g = F.logsigmoid(self.gk_proj[1](low_rank).float()) / self.gate_logit_normalizer
        if self.clamp_min is not None:
            g = g.clamp_min(self.clamp_min)
        return self._share(self._heads(g, self.head_k_dim))

    def _gate_output(self, o: Tensor, gate: Tensor | None = None) -> Tensor:  # o [B, T, H, V]
        if gate is None:
            return self.g_norm(o).flatten(-2)
        if self.fuse_norm_and_gate:
            return self.g_norm_swish_gate(o, self._heads(gate, self.head_v_dim)).flatten(-2)
        return self.g_norm(o).flatten(-2) * ACTIVATIONS[self.gate_fn](gate)

    def _share(self, x: Tensor) -> Tensor:
        """[B, T, H, size], where a key-value head serves several query heads."""
        groups: int = self.num_kv_groups
        return x if groups == 1 else x.repeat_interleave(groups, dim=2)

    @staticmethod
    def _heads(x: Tensor, size: int) -> Tensor:
        return x.unflatten(-1, (-1, size))  # [B, T, H * size] -> [B, T, H, size]


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    fla_layer.GatedLinearAttention: GatedLinearAttention,
    FlaGatedMLP: GatedMLP,
    FlaRMSNorm: RMSNorm,
    FlaFusedRMSNormGated: FusedRMSNormGated,
    FlaShortConvolution: ShortConvolution,
}
"""fla's layers, and what stands in for them."""
