"""Mamba-1 and 2 (arXiv 2312.00752, 2405.21060): transformers' weights and names, our forwards.

LoRA is alive on every projection, packed rows keep their documents apart, padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Mamba2Config, MambaConfig
from transformers.models.mamba import modeling_mamba as stock1
from transformers.models.mamba2 import modeling_mamba2 as stock2

from ssm_train.adapters import common, head, loading, mamba_checkpoint, modules, ssd_triton
from ssm_train.adapters.base import (
    Kept,
    KernelChoice,
    ModelSpec,
    Prepared,
    Traits,
)
from ssm_train.adapters.mamba_mixer import (
    GatedRMSNorm,
    Mamba2Mixer,
    MambaMixer,
    RMSNorm,
)
from ssm_train.errors import InputError
from ssm_train.kernels import implementation

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"
SUPPORTS = frozenset({"packing", "grad_ckpt"})
NORMS = ("norm.weight", "norm_f.weight")

MAMBA_TRAITS = Traits(
    lora_targets=("in_proj", "x_proj", "dt_proj", "out_proj"),
    raw_weight_reads=("conv1d", "x_proj", "dt_proj", "out_proj"),
    refused_targets=("conv1d", "out_proj"),
    keep_fp32=("A_log", "D", "dt_proj.bias"),
    no_decay=("A_log", "log_decay", "D", "dt_proj.bias", *NORMS),
    supports=SUPPORTS,
)
MAMBA2_TRAITS = Traits(
    lora_targets=("in_proj", "out_proj"),
    raw_weight_reads=("conv1d", "out_proj"),
    refused_targets=("conv1d", "out_proj"),
    keep_fp32=("A_log", "D", "dt_bias"),
    no_decay=("A_log", "D", "dt_bias", *NORMS),
    supports=SUPPORTS,
)


class Block:
    """Pre-norm residual block: hidden + mixer(norm(hidden)), where the sum is left to the norm of
    the next block, which then reads and writes it once."""

    def forward(
        self: Any, hidden_states: Tensor, residual: Tensor | None = None, **mixer_inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """Two tensors [B, T, H] whose sum is the block's input (None: zeros), and two whose sum is
        its output."""
        if residual is not None:
            normed, total = self.norm(hidden_states, residual)
        else:
            normed, total = self.norm(hidden_states), hidden_states
            if self.residual_in_fp32:
                total = total.to(torch.promote_types(total.dtype, torch.float32))
        return self.mixer(normed, **mixer_inputs), total


class MambaBlock(Block, stock1.MambaBlock):  # type: ignore[misc]
    pass


class Mamba2Block(Block, stock2.Mamba2Block):  # type: ignore[misc]
    pass


class MambaRMSNorm(RMSNorm, stock1.MambaRMSNorm):  # type: ignore[misc]
    pass


class Mamba2RMSNorm(RMSNorm, stock2.Mamba2RMSNorm):  # type: ignore[misc]
    pass


class Mamba2RMSNormGated(GatedRMSNorm, stock2.MambaRMSNormGated):  # type: ignore[misc]
    pass


class Backbone:
    """Embeddings, blocks, final norm; masks and document boundaries reach every mixer."""

    output_class: type

    def forward(
        self: Any,
        input_ids: Tensor | None = None,  # [B, T]
        inputs_embeds: Tensor | None = None,  # [B, T, H], instead of input_ids
        cache_params: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **_: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and cache_params is None:
            cache_params = DynamicCache(config=self.config)
        assert cu_seqlens is None or (cache_params is None and attention_mask is None), (
            "packed rows carry cu_seqlens alone: no cache, no attention mask"
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        every_hidden, residual = [], None
        for layer in self.layers:
            hidden, residual = layer(
                hidden,
                residual,
                cache_params=cache_params,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
            )
            if output_hidden_states:
                every_hidden.append(hidden + residual)
        hidden, _ = self.norm_f(hidden, residual)
        output = self.output_class(
            last_hidden_state=hidden,
            cache_params=cache_params if use_cache else None,
            hidden_states=(*every_hidden, hidden) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()


class MambaModel(Backbone, stock1.MambaModel):
    output_class = stock1.MambaOutput


class Mamba2Model(Backbone, stock2.Mamba2Model):
    output_class = stock2.Mamba2Output


class LanguageModel:
    """The backbone and its head; see `head.outputs` for what is returned when."""

    output_class: type

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Any = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        target_positions: Tensor | None = None,
        targets: Tensor | None = None,
        **loss_kwargs: Any,
    ) -> Any:
        outputs = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
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
        output = self.output_class(
            loss=loss,
            logits=logits,
            cache_params=outputs.cache_params,
            hidden_states=outputs.hidden_states,
        )
        return output if return_dict is not False else output.to_tuple()

    @staticmethod
    def state_places(cache: Any) -> Iterator[tuple[Any, Any]]:
        """See `decode_step.FindPlaces`: windows [B, d, W], and states [B, d, n] or
        [B, heads, head size, n]."""
        for layer in cache.layers:
            yield layer.conv_states, 0
            yield layer.recurrent_states, 0


class MambaForCausalLM(LanguageModel, stock1.MambaForCausalLM):
    output_class = stock1.MambaCausalLMOutput


class Mamba2ForCausalLM(LanguageModel, stock2.Mamba2ForCausalLM):
    output_class = stock2.Mamba2CausalLMOutput


TYPES: dict[type[nn.Module], type[nn.Module]] = {
    stock1.MambaForCausalLM: MambaForCausalLM,
    stock1.MambaModel: MambaModel,
    stock1.MambaBlock: MambaBlock,
    stock1.MambaMixer: MambaMixer,
    stock1.MambaRMSNorm: MambaRMSNorm,
    stock2.Mamba2ForCausalLM: Mamba2ForCausalLM,
    stock2.Mamba2Model: Mamba2Model,
    stock2.Mamba2Block: Mamba2Block,
    stock2.Mamba2Mixer: Mamba2Mixer,
    stock2.Mamba2RMSNorm: Mamba2RMSNorm,
    stock2.MambaRMSNormGated: Mamba2RMSNormGated,
}


def adopt(model: nn.Module) -> None:
    """Gives transformers' Mamba or Mamba-2 model our forwards, in place; weights and names stay."""
    modules.retype(model, TYPES)
    for module in model.modules():
        if isinstance(module, (MambaMixer, Mamba2Mixer)):
            modules.retype(module, {nn.Conv1d: modules.CausalConv1d})
            modules.add_sites(module, module.sites)
        if isinstance(module, MambaMixer):
            steps = modules.under_adapters(module.dt_proj)
            modules.retype(steps, {nn.Linear: modules.Fp32BiasLinear})
        if isinstance(module, Mamba2Mixer):
            module.norm.group_size = module.intermediate_size // module.n_groups


@dataclass
class MambaAdapter:
    """Mamba-1 or Mamba-2, from transformers' checkpoints, mamba_ssm's own, or a configuration."""

    name: str
    traits: Traits
    config_class: Any
    model_class: Any
    token_losses = staticmethod(common.token_losses)
    token_logits = staticmethod(common.token_logits)

    def choose_kernels(self, kernels: KernelChoice, device: str) -> dict[str, str]:
        """See `adapters.base.ModelAdapter`."""
        ours = implementation(kernels, device)
        if kernels == "triton" and ours == "reference":
            raise InputError(
                f"kernels: triton needs a GPU, but the device is {device!r}; use kernels: auto"
            )
        if self.name == "mamba2":
            scan = {"ssd": ssd_triton.implementation(kernels, device)}
        else:
            scan = {"selective_scan": ours, "pointwise": ours}
        return {"causal_conv1d": ours, **scan, "rms_norm": ours}

    def prepare(self, spec: ModelSpec) -> Prepared:
        kernels = self.choose_kernels(spec.kernels, spec.device)
        tokenizer = loading.load_tokenizer(spec, default=DEFAULT_TOKENIZER)
        model = self._load(spec, tokenizer)
        adopt(model)
        for module in model.modules():
            if hasattr(module, "kernels"):
                module.kernels = spec.kernels
        model = common.finish(model, spec, tokenizer, self.traits)
        notes = common.choose_stored(kernels, spec.device)
        return Prepared(model, tokenizer, self.traits, kernels, notes)

    def kept(self, config: Any, size: int, stored: int) -> Kept:
        """See `adapters.base.Kept`. Norms, convolutions and Mamba-1's step sizes are made again;
        its scan keeps a state for 128 steps."""
        hidden, states = config.hidden_size, config.state_size
        inner = config.expand * hidden
        if self.name == "mamba2":
            groups = 2 * config.n_groups * states  # B and C
            rows = 3 * inner + groups + config.num_heads  # in_proj, y
            fp32 = 4 * 2 * config.num_heads  # step sizes before and after the softplus
            made = size * (2 * inner + groups)  # convolution, what out_proj reads
            # x again, and what out_proj read; gradients of both, of y and z, and of in_proj's two
            working = size * 8 * inner
        else:
            rows = 3 * inner + config.time_step_rank + 2 * states  # in_proj, y, x_proj
            fp32 = 4 * (states + 1) * inner / 128  # states and sums of steps
            made = size * inner + 4 * inner  # convolution, step sizes
            # x again, gradients of x, z, y and both halves of in_proj; step sizes and theirs
            working = size * 5 * inner + 4 * 2 * inner
        residual = hidden * (4 if config.residual_in_fp32 else stored)
        return Kept(
            entering=residual + size * hidden,  # what `Block` reads
            layer=residual,  # with what the mixer gave
            mixer=size * rows + fp32,
            made_mixer=made,
            working=working + residual,
        )

    def _load(self, spec: ModelSpec, tokenizer: Any) -> Any:
        if spec.model is not None and mamba_checkpoint.is_original(
            loading.read_config(spec.model, spec.revision)
        ):
            return mamba_checkpoint.load(spec)
        model = loading.load_or_make(self.model_class, self.config_class, spec, tokenizer)
        config = model.config
        if config.model_type == "mamba2" and config.num_heads % config.n_groups:
            raise InputError(
                f"new_model: num_heads {config.num_heads} is not a multiple of n_groups "
                f"{config.n_groups}; choose n_groups so that every group has as many heads"
            )
        return model


MAMBA = MambaAdapter(
    "mamba",
    MAMBA_TRAITS,
    MambaConfig,
    stock1.MambaForCausalLM,
)
MAMBA2 = MambaAdapter(
    "mamba2",
    MAMBA2_TRAITS,
    Mamba2Config,
    stock2.Mamba2ForCausalLM,
)
