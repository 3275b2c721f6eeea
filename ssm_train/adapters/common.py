"""The first and the last steps of every family's adapter: storage, checkpointing, kernels, batches.

How checkpoints, tokenizers and configurations are read is in `loading.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssm_train.adapters import loading, ssd_triton
from ssm_train.adapters.base import Batch, LossSum, ModelSpec, Traits
from ssm_train.adapters.modules import LmHead, Part, matches, retype
from ssm_train.errors import InputError

# Implementations that choose their configurations by timing them -> the package that they are in.
TUNED = {"triton (fla)": "fla", "mamba_ssm (Triton)": "mamba_ssm"}


def cast_storage(model: nn.Module, dtype: torch.dtype, keep_fp32: tuple[str, ...]) -> None:
    """Stores all parameters in `dtype`, those named by `keep_fp32` in fp32."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if matches(name, keep_fp32) else dtype)


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
    """The last steps of every `prepare`: special ids, head, dtypes, checkpointing, device."""
    loading.align_tokenizer(model, tokenizer, spec.model or "new_model")
    retype(model.lm_head, {nn.Linear: LmHead})
    cast_storage(model, spec.dtype, traits.keep_fp32)
    if isinstance(spec.gradient_checkpointing, str):
        recompute_parts(model, spec.gradient_checkpointing)
    elif spec.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.to(spec.place or spec.device)


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
