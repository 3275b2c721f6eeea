"""Gated Linear Attention (GLA, arXiv 2312.06635): fla's weights and names, our forwards.

fla's Triton kernels run on a GPU, plain PyTorch elsewhere; nothing reads a weight past its module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from fla.layers import gla as fla_layer
from fla.layers.utils import get_layer_cache, update_layer_cache
from fla.models import gla as fla_model
from fla.modules import FusedRMSNormGated as FlaFusedRMSNormGated
from fla.modules import GatedMLP as FlaGatedMLP
from fla.modules import RMSNorm as FlaRMSNorm
from fla.modules import ShortConvolution as FlaShortConvolution
from fla.modules.activations import ACT2FN, swiglu
from fla.ops.gla import chunk_gla, fused_recurrent_gla
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ssm_train.adapters import common, loading
from ssm_train.adapters.base import (
    Batch,
    Kept,
    KernelChoice,
    LossSum,
    ModelSpec,
    Prepared,
    Traits,
)
from ssm_train.adapters.gla_triton import CHUNK, Chunks, find_chunks, packed_gla
from ssm_train.errors import InputError
from ssm_train.kernels import implementation
from ssm_train.kernels.causal_conv1d import causal_conv1d
from ssm_train.kernels.gla import gla
from ssm_train.kernels.gla.triton import gla_step
from ssm_train.kernels.rms_norm import gated_rms_norm, rms_norm

TRAITS = Traits(
    lora_targets=(
        *(f"attn.{name}_proj" for name in "qkvgo"),
        "gk_proj.0",
        "gk_proj.1",
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
    raw_weight_reads=("down_proj",),  # stock fla: swiglu_linear(gate, up, down_proj.weight)
    keep_fp32=("gk_proj.1.bias",),
    no_decay=("gk_proj.1.bias", "attn_norm.weight", "mlp_norm.weight", "norm.weight")
    + ("g_norm.weight", "g_norm_swish_gate.weight"),
    supports=frozenset({"packing", "cached_decode", "grad_ckpt"}),
)

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
        """Norm of `x + residual`; with `prenorm` also that sum, in the residual's dtype."""
        if residual is None:
            y, total = rms_norm(x, self.weight, self.eps, kernels=self.kernels), x
        else:
            y, total = rms_norm(x, self.weight, self.eps, residual=residual, kernels=self.kernels)
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


class GatedMLP(common.Part, FlaGatedMLP):  # type: ignore[misc]
    part = "mlp"
    kernels: KernelChoice = "auto"

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """SwiGLU through the down_proj module, whose LoRA stock fla's fused form would miss."""
        gate, up = common.project(x, self.gate_proj, self.up_proj)
        return self.down_proj(swiglu(gate, up) if uses_triton(self, x) else F.silu(gate) * up)


class GatedLinearAttention(common.Part, fla_layer.GatedLinearAttention):  # type: ignore[misc]
    part = "mixer"
    kernels: KernelChoice = "auto"
    dtype_checked = False
    sites = ("forgotten",)
    """Names of its `common.Site` modules."""

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
            common.check_fp32(self, ("gk_proj.1.bias",))
            self.dtype_checked = True
        length, caching = hidden_states.shape[1], past_key_values is not None
        cached = get_layer_cache(self, past_key_values) or {}
        real = None  # [B, T, 1]
        if attention_mask is not None and cu_seqlens is None:
            real = attention_mask[:, -length:, None].bool()

        projections = [self.q_proj, self.k_proj, self.v_proj, self.gk_proj[0]]
        if self.use_output_gate:
            projections.append(self.g_proj)
        q, k, v, decay, *gate = common.project(hidden_states, *projections)
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
        g = self._log_decay(decay)  # [B, T, H, K] fp32
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
        return self.o_proj(self._gate_output(o, *gate)), None, past_key_values

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


class GLAForCausalLM(fla_model.GLAForCausalLM):
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        target_positions: Tensor | None = None,
        targets: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """See `common.head_outputs` for what comes back."""
        chunks = None
        if cu_seqlens is not None and cu_seqlens.is_cuda:  # once a batch, for all layers
            rows: Any = input_ids if inputs_embeds is None else inputs_embeds
            chunks = find_chunks(cu_seqlens, rows.shape[1])
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            chunks=chunks,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        loss, logits = common.head_outputs(
            self,
            outputs.last_hidden_state,
            target_positions=target_positions,
            targets=targets,
            labels=labels,
            logits_to_keep=logits_to_keep,
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    @staticmethod
    def state_places(cache: Any) -> Iterator[tuple[Any, Any]]:
        """See `decode_step.FindPlaces`: states [B, H, K, V], and windows [B, D, W] of q, k, v."""
        for layer in cache.layers:
            yield layer.state, "recurrent_state"
            if layer.state["conv_state"] is not None:
                windows = layer.state["conv_state"] = list(layer.state["conv_state"])
                yield from ((windows, i) for i in range(len(windows)))


OURS: dict[type[nn.Module], type[nn.Module]] = {
    fla_model.GLAForCausalLM: GLAForCausalLM,
    fla_layer.GatedLinearAttention: GatedLinearAttention,
    FlaGatedMLP: GatedMLP,
    FlaRMSNorm: RMSNorm,
    FlaFusedRMSNormGated: FusedRMSNormGated,
    FlaShortConvolution: ShortConvolution,
}


def adopt(model: Any, kernels: KernelChoice | None = None) -> GLAForCausalLM:
    """Gives a stock fla model our forwards, in place; also under PEFT layers.

    Without `kernels`, modules that are ours already keep their choice; new ones have "auto".
    """
    refuse_what_is_not_covered(model.config.to_dict())
    common.retype(model, OURS)
    for module in model.modules():
        if isinstance(module, GatedLinearAttention):
            gate = module.gk_proj[1]
            common.retype(getattr(gate, "base_layer", gate), {nn.Linear: common.Fp32BiasLinear})
            common.add_sites(module, module.sites)
        if kernels is not None and type(module) in OURS.values() and hasattr(module, "kernels"):
            module.kernels = kernels
    return model


def refuse_what_is_not_covered(config: Mapping[str, Any]) -> None:
    for name, meaning in (
        ("attn", "softmax attention in some layers"),
        ("attnres_block_size", "attention over residuals"),
    ):
        if (value := config.get(name)) is not None:
            raise InputError(
                f"GLA with {name}={value!r} ({meaning}) is not supported; use a checkpoint "
                f"whose config.json has {name}: null"
            )


class GlaAdapter:
    """fla's GLA checkpoints and new GLA models."""

    name = "gla"
    traits = TRAITS

    def choose_kernels(self, kernels: KernelChoice, device: str) -> dict[str, str]:
        """See `adapters.base.ModelAdapter`. What runs follows the tensors (`uses_triton`)."""
        on_gpu = torch.device(device).type == "cuda"
        if kernels == "triton" and not on_gpu:
            raise InputError(
                f"kernels: triton needs a GPU, but the device is {device!r}; use kernels: auto"
            )
        chosen = "triton (fla)" if on_gpu and kernels != "reference" else "reference"
        ops = dict.fromkeys(("gla", "causal_conv1d", "swiglu"), chosen)
        return ops | {"rms_norm": implementation(kernels, device)}

    def prepare(self, spec: ModelSpec) -> Prepared:
        """See `adapters.base.ModelAdapter`. A checkpoint's own tokenizer wins over the spec's."""
        kernels = self.choose_kernels(spec.kernels, spec.device)
        if spec.model is not None and loading.has_tokenizer(spec.model, spec.revision):
            spec = replace(spec, tokenizer=None)
        tokenizer = loading.load_tokenizer(spec)
        if spec.model is not None:
            refuse_what_is_not_covered(loading.read_config(spec.model, spec.revision))
        else:
            refuse_what_is_not_covered(spec.new_model or {})
        model = loading.load_or_make(GLAForCausalLM, fla_model.GLAConfig, spec, tokenizer)
        adopt(model, spec.kernels)
        model = common.finish(model, spec, tokenizer, self.traits)
        notes = common.choose_stored(kernels, spec.device)
        return Prepared(model, tokenizer, self.traits, kernels, notes)

    def kept(self, config: Any, size: int) -> Kept:
        """See `adapters.base.Kept`."""
        hidden, inner = config.hidden_size, config.intermediate_size
        if inner is None:  # as fla's GatedMLP chooses it
            inner = 256 * -(-int(hidden * config.hidden_ratio * 2 / 3) // 256)
        keys, values = int(hidden * config.expand_k), int(hidden * config.expand_v)
        rows = 2 * keys + values  # q, k, v
        copies = 1 + bool(config.use_short_conv) + bool(config.feature_map)
        fp32 = 4 * (2 * keys + CHUNK * config.num_heads)  # gate before and after, products of q, k
        return Kept(
            layer=size * 2 * hidden,  # what both norms read
            mixer=size * (hidden + copies * rows + 3 * values) + fp32,  # gate, o, what o_proj reads
            mlp=size * (hidden + 3 * inner),
        )

    def token_losses(self, model: nn.Module, batch: Batch) -> LossSum:
        return common.token_losses(model, batch)

    def token_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return common.token_logits(model, batch)


GLA = GlaAdapter()
