"""What the model families share: modules that LoRA reaches, precision of storage, the LM's surface.

How checkpoints, tokenizers and configurations are read is in `loading.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssm_train.adapters import loading, ssd_triton
from ssm_train.adapters.base import Batch, KernelChoice, LossSum, ModelSpec, Traits
from ssm_train.errors import InputError
from ssm_train.kernels.causal_conv1d import causal_conv1d
from ssm_train.loss import sum_cross_entropy, sum_linear_cross_entropy

# Implementations that choose their configurations by timing them -> the package that they are in.
TUNED = {"triton (fla)": "fla", "mamba_ssm (Triton)": "mamba_ssm"}


def retype(model: nn.Module, table: Mapping[type[nn.Module], type[nn.Module]]) -> int:
    """Gives every module whose exact type is in `table` the type it maps to; returns how many.

    Weights, names and hooks stay; only the methods are ours. The new types subclass the old ones
    and add no state of their own.
    """
    count = 0
    for module in model.modules():
        if new_type := table.get(type(module)):
            module.__class__ = new_type
            count += 1
    return count


def under_adapters(module: Any) -> Any:
    """The layer itself, where adapters are around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def stored_weight(module: Any) -> Any:
    """The weight of a layer, under adapters too, for a look at what it is; None: it has none.
    ZeRO-3 gathers one that is asked for by name while another module's forward runs."""
    module = under_adapters(module)
    stored = dict.get(module._parameters, "weight")
    return getattr(module, "weight", None) if stored is None else stored


def is_plain_linear(module: nn.Module) -> bool:
    """Whether its weight may be used in place of its forward: no adapter, no hooks, not sharded."""
    weight = stored_weight(module)
    return (
        type(module) in (nn.Linear, Fp32BiasLinear)
        and isinstance(weight, Tensor)
        and type(weight.data) is Tensor
        and not hasattr(weight, "ds_id")  # ZeRO-3: only the module's own forward gathers it
        and not has_hooks(module)
    )


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def autocasts(x: Tensor) -> bool:
    """Whether operations choose their dtype by themselves where x is."""
    return x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products of x."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


class Site(nn.Module):
    """A place in a mixer where a PEFT method may step in. It has no parameters and changes
    nothing: the value that it gets is the value that it gives."""

    def forward(self, value: Any, *context: Tensor) -> Any:
        return value


def add_sites(module: nn.Module, names: tuple[str, ...]) -> None:
    """Gives a mixer its sites, unless it has them."""
    for name in names:
        if not hasattr(module, name):
            module.add_module(name, Site())


class Fp32BiasLinear(nn.Linear):
    """A linear layer whose bias is added in fp32 and whose output is fp32 (or fp64).

    For the projections before a softplus or a logsigmoid. All of it happens in the layer's own
    forward, so that LoRA wraps it and sharding engines gather the weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.add_bias(F.linear(x, self.weight))

    def add_bias(self, y: Tensor) -> Tensor:
        if self.bias is None:
            return y.to(torch.promote_types(y.dtype, torch.float32))
        return y + self.bias.to(torch.promote_types(y.dtype, torch.float32))  # y is cast on the way


def project(x: Tensor, *modules: nn.Module) -> list[Tensor]:
    """Outputs of modules that read the same x; those that say so (`joins`) are one operation."""
    lead: Any = next((module for module in modules if hasattr(module, "joins")), None)
    joint = [module for module in modules if lead is not None and lead.joins(module, x)]
    together = dict(zip(joint, lead.forward_together(joint, x), strict=True)) if joint else {}
    return [together[module] if module in together else module(x) for module in modules]


class CausalConv1d(nn.Conv1d):
    """A depthwise causal convolution over time-major input; its weight is read only in here."""

    kernels: KernelChoice = "auto"

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        window: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        activation: str | None = None,
        output_final_window: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, d] -> ([B, T, d], the last W - 1 inputs [N, d, W - 1] or None).

        `window` [N, d, W - 1]: the inputs before the first one, zeros by default.
        """
        return causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            activation=activation,
            initial_window=window,
            output_final_window=output_final_window,
            cu_seqlens=cu_seqlens,
            kernels=self.kernels,
        )


def matches(name: str, suffixes: Iterable[str]) -> bool:
    """Whether a dotted name ends with one of the suffixes, as whole name parts."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def cast_storage(model: nn.Module, dtype: torch.dtype, keep_fp32: tuple[str, ...]) -> None:
    """Stores all parameters in `dtype`, those named by `keep_fp32` in fp32."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if matches(name, keep_fp32) else dtype)


class Part:
    """A mixer or an MLP, which may be recomputed in the backward pass without its whole layer."""

    part: str
    recompute = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        forward: Any = cls.__dict__.get("forward")
        if forward is None or hasattr(forward, "__wrapped__"):
            return

        @wraps(forward)
        def forward_or_recompute(self: Any, *args: Any, **options: Any) -> Any:
            if self.recompute and self.training and torch.is_grad_enabled():
                return checkpoint(forward, self, *args, use_reentrant=False, **options)
            return forward(self, *args, **options)

        cls.forward = forward_or_recompute  # type: ignore[attr-defined]


def recompute_parts(model: nn.Module, part: str) -> None:
    """Recomputes each "mixer" or each "mlp" in the backward pass. Raises InputError where the model
    has none."""
    parts = [module for module in model.modules() if isinstance(module, Part)]
    chosen = [module for module in parts if module.part == part]
    if not chosen:
        raise InputError(
            f"gradient_checkpointing: {part}: this model has no part of that kind; use "
            f"{' or '.join(sorted({module.part for module in parts} | {'true'}))}"
        )
    for module in chosen:
        module.recompute = True


def enable_gradient_checkpointing(model: Any) -> None:
    """Recomputes each layer in the backward pass. Non-reentrant: frozen inputs need no gradient."""
    with warnings.catch_warnings():  # the new name is not in the oldest transformers that we take
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def choose_stored(kernels: Mapping[str, str], device: str) -> list[str]:
    """Kernels of fla and mamba_ssm, where they are in use, run as is stored for this GPU, instead
    of being tuned in the first steps (`kernels.tuning`). Returns the lines for the log."""
    in_use = set(kernels.values())
    packages = [package for name, package in TUNED.items() if name in in_use]
    if not packages:
        return []
    from ssm_train.kernels.choices import Gpu
    from ssm_train.kernels.tuning import use_stored  # triton, which a CPU may do without

    if "mamba_ssm" in packages:
        ssd_triton.load_kernel(ssd_triton.SSD, "mamba_chunk_scan_combined")
    return [use_stored(Gpu.at(device), package) for package in packages]


def finish(model: Any, spec: ModelSpec, tokenizer: Any, traits: Traits) -> nn.Module:
    """The last steps of every `prepare`: special ids, storage dtypes, checkpointing, device."""
    loading.align_tokenizer(model, tokenizer, spec.model or "new_model")
    cast_storage(model, spec.dtype, traits.keep_fp32)
    if isinstance(spec.gradient_checkpointing, str):
        recompute_parts(model, spec.gradient_checkpointing)
    elif spec.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.to(spec.place or spec.device)


def head_outputs(
    lm: Any,
    hidden: Tensor,
    *,
    target_positions: Tensor | None = None,
    targets: Tensor | None = None,
    labels: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    **loss_kwargs: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """The end of every family's CausalLM forward: hidden [B, T, H] -> (loss, logits fp32).

    * `target_positions` [S] (indices into B * T) and `targets` [S]: the loss summed over the
      targets, and no logits;
    * `target_positions` alone: logits [S, V];
    * `labels` [B, T]: Hugging Face's meaning, shifted inside, mean over labels that are not -100;
    * else the logits of the last `logits_to_keep` positions, or of all.
    """
    assert targets is None or target_positions is not None, "targets need target_positions"
    if target_positions is not None and targets is not None:
        return target_loss(hidden, lm.lm_head, target_positions, targets), None
    if target_positions is not None:
        return None, target_logits(hidden, lm.lm_head, target_positions)
    if labels is None and isinstance(logits_to_keep, int):
        hidden = hidden[:, -logits_to_keep:]  # 0 keeps all
    elif labels is None:
        hidden = hidden[:, logits_to_keep]
    logits = lm.lm_head(hidden.to(stored_weight(lm.lm_head).dtype)).float()
    if labels is None:
        return None, logits
    loss = lm.loss_function(
        logits=logits, labels=labels, vocab_size=lm.config.vocab_size, **loss_kwargs
    )
    return loss, logits


def target_loss(hidden: Tensor, lm_head: nn.Module, positions: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over flat `positions` [S] of hidden [B, T, H]: [] fp32.

    A plain head never has all logits at once; fp16 has, because its gradients are scaled first.
    """
    weight = stored_weight(lm_head)
    dtype = compute_dtype(hidden) if autocasts(hidden) else weight.dtype
    if is_plain_linear(lm_head) and lm_head.bias is None and dtype != torch.float16:
        return sum_linear_cross_entropy(hidden.flatten(0, 1), weight, positions, targets, dtype)
    return sum_cross_entropy(target_logits(hidden, lm_head, positions), targets)


def target_logits(hidden: Tensor, lm_head: nn.Module, positions: Tensor) -> Tensor:
    """Logits [S, V] fp32 at flat `positions` [S] of hidden [B, T, H], and nowhere else."""
    chosen = hidden.flatten(0, 1)[positions]
    return lm_head(chosen.to(stored_weight(lm_head).dtype)).float()


def batch_inputs(batch: Batch) -> dict[str, Tensor]:
    """The tensors that say what a batch's rows are: documents in one row, or padded rows."""
    inputs = {"input_ids": batch.input_ids}
    if batch.cu_seqlens is not None:
        inputs["cu_seqlens"] = batch.cu_seqlens
    elif batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    return inputs


def token_losses(model: nn.Module, batch: Batch) -> LossSum:
    """Cross entropy over the batch's targets; one call of the (perhaps wrapped) model."""
    output = model(
        **batch_inputs(batch),
        target_positions=batch.target_positions,
        targets=batch.targets,
        use_cache=False,
    )
    return LossSum(output.loss, batch.num_targets)


def token_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the batch's target positions, [S, V] fp32."""
    output = model(**batch_inputs(batch), target_positions=batch.target_positions, use_cache=False)
    return output.logits


def check_dtypes_again(model: nn.Module) -> None:
    """Mixers check at their next forward what they checked at their first: an engine has had its
    way with the model since."""
    module: Any
    for module in model.modules():
        if hasattr(module, "dtype_checked"):
            module.dtype_checked = False


def check_fp32(module: nn.Module, names: tuple[str, ...]) -> None:
    """Asserts that these parameters are stored in fp32 (or fp64): in bf16, small steps are lost.

    Mixers call it in their first forward, and in the first one under an engine.
    """
    for name in names:
        *path, last = name.split(".")
        owner: Any = module
        for part in path:
            owner = getattr(owner, part, None)
        owner = under_adapters(owner)
        owner = None if owner is None else dict.get(owner._parameters, last)  # as `stored_weight`
        if isinstance(owner, Tensor) and owner.dtype not in (torch.float32, torch.float64):
            raise AssertionError(f"{name} of {type(module).__name__} is {owner.dtype}, not fp32")
