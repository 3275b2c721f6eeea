"""Gated Linear Attention (GLA, arXiv 2312.06635): fla's weights and names, our forwards.

fla's Triton kernels run on a GPU, plain PyTorch elsewhere; nothing reads a weight past its module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from fla.models import gla as fla_model
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ssm_train.adapters import common, head, loading, modules
from ssm_train.adapters.base import (
    Kept,
    KernelChoice,
    ModelSpec,
    Prepared,
    Traits,
)
from ssm_train.adapters.gla_mixer import LAYERS, GatedLinearAttention
from ssm_train.adapters.gla_triton import CHUNK, find_chunks
from ssm_train.errors import InputError
from ssm_train.kernels import implementation

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
    supports=frozenset({"packing", "grad_ckpt"}),
)


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
        return_dict: bool | None = None,
        target_positions: Tensor | None = None,
        targets: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **loss_kwargs: Any,
    ) -> Any:
        """See `head.outputs` for what comes back."""
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
        loss, logits = head.outputs(
            self,
            outputs.last_hidden_state,
            target_positions=target_positions,
            targets=targets,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **loss_kwargs,
        )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output if return_dict is not False else output.to_tuple()

    @staticmethod
    def state_places(cache: Any) -> Iterator[tuple[Any, Any]]:
        """See `decode_step.FindPlaces`: states [B, H, K, V], and windows [B, D, W] of q, k, v."""
        for layer in cache.layers:
            yield layer.state, "recurrent_state"
            if layer.state["conv_state"] is not None:
                windows = layer.state["conv_state"] = list(layer.state["conv_state"])
                yield from ((windows, i) for i in range(len(windows)))


OURS = LAYERS | {fla_model.GLAForCausalLM: GLAForCausalLM}


def adopt(model: Any, kernels: KernelChoice | None = None) -> GLAForCausalLM:
    """Gives a stock fla model our forwards, in place; also under PEFT layers.

    Without `kernels`, modules that are ours already keep their choice; new ones have "auto".
    """
    refuse_what_is_not_covered(model.config.to_dict())
    modules.retype(model, OURS)
    for module in model.modules():
        if isinstance(module, GatedLinearAttention):
            gate = modules.under_adapters(module.gk_proj[1])
            modules.retype(gate, {nn.Linear: modules.Fp32BiasLinear})
            gate.kernels = kernels or gate.kernels
            modules.add_sites(module, module.sites)
        if kernels is not None and type(module) in OURS.values() and hasattr(module, "kernels"):
            module.kernels = kernels
    return model


def refuse_what_is_not_covered(config: Mapping[str, Any]) -> None:
    """Raises InputError for a configuration with layers that our forwards do not know."""
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
    token_losses = staticmethod(common.token_losses)
    token_logits = staticmethod(common.token_logits)

    def choose_kernels(self, kernels: KernelChoice, device: str) -> dict[str, str]:
        """See `adapters.base.ModelAdapter`. What runs follows the tensors (`uses_triton`)."""
        on_gpu = torch.device(device).type == "cuda"
        if kernels == "triton" and not on_gpu:
            raise InputError(
                f"kernels: triton needs a GPU, but the device is {device!r}; use kernels: auto"
            )
        chosen = "triton (fla)" if on_gpu and kernels != "reference" else "reference"
        ours = implementation(kernels, device)
        ops = dict.fromkeys(("gla", "causal_conv1d"), chosen)
        return ops | {"pointwise": ours, "rms_norm": ours}

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

    def kept(self, config: Any, size: int, stored: int) -> Kept:
        """See `adapters.base.Kept`. Norms, gate and SwiGLU are made again."""
        hidden, inner = config.hidden_size, config.intermediate_size
        if inner is None:  # as fla's GatedMLP chooses it
            inner = 256 * -(-int(hidden * config.hidden_ratio * 2 / 3) // 256)
        keys, values = int(hidden * config.expand_k), int(hidden * config.expand_v)
        rows = 2 * keys + values  # q, k, v
        copies = 1 + bool(config.use_short_conv) + bool(config.feature_map)
        products = CHUNK * config.num_heads  # of q and k in a chunk
        states = keys * values / config.num_heads / CHUNK
        mlp = size * 2 * inner  # gate and up
        return Kept(
            entering=stored * hidden,
            layer=stored * 2 * hidden,  # what both norms read
            mixer=size * (copies * rows + 2 * values + products),  # and o, and its gate
            mlp=mlp,
            made_mixer=size * values + 4 * 2 * keys,  # what o_proj reads; the decays' logarithms
            made_mlp=size * inner,
            # in the mixer: states and their gradients; the gate's three, and gradients of q, k and
            # gate, in fp32; those of v, o, its gate and the layer. The MLP's are gone by then.
            working=size * (2 * states + 3 * values + hidden) + 4 * 8 * keys - mlp,
        )


GLA = GlaAdapter()
