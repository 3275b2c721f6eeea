"""Bamba: softmax attention and Mamba-2 in one model. Attention is transformers', the mixer ours.

Packing is not offered: attention would see over document boundaries.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BambaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.bamba import modeling_bamba as stock

from ssm_train.adapters import common, head, loading, modules, ssd_triton
from ssm_train.adapters.base import KernelChoice, ModelSpec, Prepared, Traits
from ssm_train.adapters.mamba_mixer import CachedMixer, GatedRMSNorm, Mamba2Mixer, RMSNorm
from ssm_train.kernels import implementation

TRAITS = Traits(
    lora_targets=(
        *("in_proj", "out_proj"),
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ),
    raw_weight_reads=("conv1d", "out_proj"),
    keep_fp32=("A_log", "D", "dt_bias"),
    no_decay=("A_log", "D", "dt_bias", "norm.weight")
    + ("input_layernorm.weight", "pre_ff_layernorm.weight", "final_layernorm.weight"),
    supports=frozenset({"grad_ckpt"}),
)


class BambaMixer(CachedMixer, stock.BambaMixer):
    """Mamba-2 under other names of configuration: the same parameters, the same forward."""

    fp32_names = Mamba2Mixer.fp32_names
    sites = Mamba2Mixer.sites
    slices = Mamba2Mixer.slices  # type: ignore[assignment]
    forward = Mamba2Mixer.forward  # type: ignore[assignment]
    _steps_in_place = Mamba2Mixer._steps_in_place


class BambaRMSNorm(RMSNorm, stock.BambaRMSNorm):  # type: ignore[misc]
    pass


class BambaRMSNormGated(GatedRMSNorm, stock.BambaRMSNormGated):  # type: ignore[misc]
    pass


class BambaForCausalLM(stock.BambaForCausalLM):
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        target_positions: Tensor | None = None,
        targets: Tensor | None = None,
        return_dict: bool | None = None,
        **more_inputs: Any,
    ) -> Any:
        """See `head.outputs` for what comes back; `more_inputs` of the model and of its loss."""
        assert cu_seqlens is None, "Bamba's attention does not know packed documents"
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **more_inputs,
        )
        loss, logits = head.outputs(
            self,
            outputs.last_hidden_state,
            target_positions=target_positions,
            targets=targets,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **more_inputs,
        )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict is not False else output.to_tuple()


OURS: dict[type[nn.Module], type[nn.Module]] = {
    stock.BambaForCausalLM: BambaForCausalLM,
    stock.BambaMixer: BambaMixer,
    stock.BambaRMSNorm: BambaRMSNorm,
    stock.BambaRMSNormGated: BambaRMSNormGated,
    nn.Conv1d: modules.CausalConv1d,  # Bamba's only convolutions are the mixers'
}


def adopt(model: Any) -> None:
    """Gives transformers' Bamba our forwards, in place; weights and names stay."""
    modules.retype(model, OURS)
    mixers: list[Any] = [m for m in model.modules() if isinstance(m, BambaMixer)]
    for mixer in mixers:
        mixer.norm.group_size = mixer.intermediate_size // mixer.n_groups
        modules.add_sites(mixer, mixer.sites)


class BambaAdapter:
    """transformers' Bamba checkpoints and new Bamba models."""

    name = "bamba"
    traits = TRAITS
    token_losses = staticmethod(common.token_losses)
    token_logits = staticmethod(common.token_logits)

    def choose_kernels(self, kernels: KernelChoice, device: str) -> dict[str, str]:
        """See `adapters.base.ModelAdapter`."""
        return {
            "causal_conv1d": implementation(kernels, device),
            "ssd": ssd_triton.implementation(kernels, device),
            "rms_norm": implementation(kernels, device),
        }

    def prepare(self, spec: ModelSpec) -> Prepared:
        kernels = self.choose_kernels(spec.kernels, spec.device)
        tokenizer = loading.load_tokenizer(spec)
        model = loading.load_or_make(stock.BambaForCausalLM, BambaConfig, spec, tokenizer)
        adopt(model)
        for module in model.modules():
            if hasattr(module, "kernels"):
                module.kernels = spec.kernels
        model = common.finish(model, spec, tokenizer, self.traits)
        notes = common.choose_stored(kernels, spec.device)
        return Prepared(model, tokenizer, self.traits, kernels, notes)


BAMBA = BambaAdapter()
