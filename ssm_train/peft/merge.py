"""An adapter folded into full weights, in fp32, with proof that the function stayed the same."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssm_train.adapters import mamba_checkpoint
from ssm_train.adapters.base import ModelSpec, Traits
from ssm_train.adapters.loading import load_weights, save_model
from ssm_train.adapters.registry import adopt
from ssm_train.errors import InputError
from ssm_train.peft.cards import merged_card
from ssm_train.peft.export import needs_ssm_lora
from ssm_train.peft.lora import lora_layers
from ssm_train.peft.tuner import own_layers

PROBE_SHAPE = (2, 67)
FileFormat = Literal["transformers", "mamba_ssm"]


@dataclass(frozen=True)
class Merged:
    """A model without adapter layers, and how far its logits are from base plus adapter."""

    model: nn.Module
    difference: float
    """Root mean square of the logits' change, relative to that of the logits."""
    probe: Tensor
    """The token ids [B, T] of those logits."""
    ssm_lora: bool
    """Whether the adapter would be refused or dead through PEFT alone."""


def merge_adapter(model: nn.Module, traits: Traits, tolerance: float = 1e-5) -> Merged:
    """Adds every adapter of `model` (a PeftModel, which is used up) to its base weights.

    Half-precision weights become fp32 first: in bf16 a small update is rounded away. Raises
    InputError if logits of random tokens change by more than `tolerance`, both as root mean square:
    a wrong weight moves every logit, while the largest change belongs to the one token whose norm
    happened to be ill-conditioned.
    """
    peft_model: Any = model
    device = next(model.parameters()).device
    vocabulary = peft_model.get_base_model().config.vocab_size
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(0, vocabulary, PROBE_SHAPE, generator=generator).to(device)
    ssm_lora = needs_ssm_lora(model, traits)
    model.eval()
    _store_in_fp32(model)
    before = _logits(model, probe)
    _untie(model)
    try:
        with warnings.catch_warnings():  # the head is untied, and PEFT notes it in the config
            warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
            warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")
            merged = peft_model.merge_and_unload(safe_merge=True)
    except InputError:  # a layer's own
        raise
    except ValueError as error:  # PEFT's check that merged weights are finite
        raise InputError(f"the adapter cannot be merged: {error}") from error
    difference = _difference(_logits(merged, probe), before)
    if not difference <= tolerance:  # also when it is not a number
        raise InputError(
            f"the merged model's logits differ by {difference:.1e} of their size, more than the "
            f"tolerance {tolerance:.1e}; raise it only if that is small enough for you"
        )
    return Merged(merged, difference, probe, ssm_lora)


def check_format(config: Any, file_format: FileFormat) -> None:
    """Raises InputError for a model that the format cannot hold, from its configuration alone."""
    if file_format == "mamba_ssm":
        mamba_checkpoint.unmap_config(config)


def write_merged(
    merged: Merged,
    directory: str | Path,
    *,
    base_id: str,
    tokenizer: Any = None,
    file_format: FileFormat = "transformers",
) -> Path:
    """Writes full weights, the tokenizer and a card; the model is on the CPU afterwards.

    `file_format`: transformers (stock class names), or mamba_ssm for Mamba-1 and 2. Raises
    InputError for weights that the format has no place for, RuntimeError where the files, reopened,
    do not hold the model; then nothing stays.
    """
    directory = Path(directory)
    model: Any = merged.model.cpu()
    check_format(model.config, file_format)
    _check_places(model)
    partial = directory.with_name(f"{directory.name}.partial")  # until the files are proven
    if partial.exists() or partial.is_symlink():
        raise InputError(f"{partial} is in the way, perhaps of a merge that was killed; remove it")
    try:
        if file_format == "mamba_ssm":
            mamba_checkpoint.write(model, partial)
        else:
            save_model(model, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _verify(model, partial, file_format, merged.probe.cpu())
        card = merged_card(
            base_id,
            merged.difference,
            merged.probe.numel(),
            str(next(model.parameters()).dtype).removeprefix("torch."),
            merged.ssm_lora,
            file_format,
        )
        (partial / "README.md").write_text(card)
        if directory.is_dir():  # an empty one may be replaced
            directory.rmdir()
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def _store_in_fp32(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()


def _untie(model: nn.Module) -> None:
    """Own copies of weights that an adapted layer shares: merging must not move the embedding."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for layer in (*lora_layers(model).values(), *own_layers(model).values()):
        base = layer.get_base_layer()
        if owners.get(id(getattr(base, "weight", None)), 0) > 1:
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)


@torch.inference_mode()
def _logits(model: nn.Module, probe: Tensor) -> Tensor:
    return model(input_ids=probe, use_cache=False).logits.float()


def _difference(logits: Tensor, expected: Tensor) -> float:
    return ((logits - expected).norm() / expected.norm()).item()


def _library_class(model: nn.Module) -> Any:
    """The class of the library that knows nothing of us; ours has its name."""
    return next(c for c in type(model).__mro__ if not c.__module__.startswith("ssm_train."))


def _check_places(model: Any) -> None:
    """A weight that the library's model does not have would be left out at loading, unnoticed."""
    with torch.device("meta"):
        stock = _library_class(model)(model.config)
    if extra := sorted(model.state_dict().keys() - stock.state_dict().keys()):
        raise InputError(
            f"the merged weights cannot be written: {type(stock).__name__} has no place for "
            f"{extra[0]}{f' and {len(extra) - 1} more' * (len(extra) > 1)}; keep the adapter"
        )


def _verify(model: Any, directory: Path, file_format: FileFormat, probe: Tensor) -> None:
    """The files hold every tensor and the function, read as their users' libraries read them."""
    spec = ModelSpec(model=str(directory))
    if file_format == "mamba_ssm":
        written = mamba_checkpoint.load(spec)
    else:
        written = load_weights(_library_class(model), spec)
    held = model.state_dict()
    for name, tensor in written.state_dict().items():
        if not torch.equal(tensor, held[name]):
            raise RuntimeError(f"{directory}: {name} is not what the merged model holds")
    adopt(written)
    difference = _difference(_logits(written, probe), _logits(model, probe))
    if not difference <= 1e-6:  # the same weights: what is left is the configuration
        raise RuntimeError(f"{directory}: the files' logits differ by {difference:.1e}")
