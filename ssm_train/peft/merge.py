"""An adapter folded into full weights, in fp32, with proof that the function stayed the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssm_train.adapters.base import Traits
from ssm_train.adapters.loading import save_model
from ssm_train.errors import InputError
from ssm_train.peft.cards import merged_card
from ssm_train.peft.export import needs_ssm_lora
from ssm_train.peft.lora import lora_layers

PROBE_SHAPE = (2, 67)


@dataclass(frozen=True)
class Merged:
    """A model without adapter layers, and how far its logits are from base plus adapter."""

    model: nn.Module
    difference: float
    """Root mean square of the logits' change, relative to that of the logits."""
    num_probe_tokens: int
    ssm_lora: bool
    """Whether the adapter would be refused or dead through PEFT alone."""


def merge_adapter(
    model: nn.Module, traits: Traits, probe: Tensor | None = None, tolerance: float = 1e-5
) -> Merged:
    """Adds every adapter of `model` (a PeftModel, which is used up) to its base weights.

    Half-precision weights become fp32 first: in bf16 a small update is rounded away. `probe`:
    token ids [B, T], else random ones. Raises InputError if logits change by more than
    `tolerance`, both as root mean square: a wrong weight moves every logit, while the largest
    change belongs to the one token whose norm happened to be ill-conditioned.
    """
    peft_model: Any = model
    device = next(model.parameters()).device
    if probe is None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = peft_model.get_base_model().config.vocab_size
        probe = torch.randint(0, vocabulary, PROBE_SHAPE, generator=generator)
    probe = probe.to(device)
    ssm_lora = needs_ssm_lora(model, traits)
    model.eval()
    _store_in_fp32(model)
    before = _logits(model, probe)
    _untie(model)
    try:
        merged = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT's check that merged weights are finite
        raise InputError(f"the adapter cannot be merged: {error}") from error
    after = _logits(merged, probe)
    difference = ((after - before).norm() / before.norm()).item()
    if not difference <= tolerance:  # also when it is not a number
        raise InputError(
            f"the merged model's logits differ by {difference:.1e} of their size, more than the "
            f"tolerance {tolerance:.1e}; raise it only if that is small enough for you"
        )
    return Merged(merged, difference, probe.numel(), ssm_lora)


def write_merged(
    merged: Merged, directory: str | Path, *, base_id: str, tokenizer: Any = None
) -> Path:
    """Writes full weights in transformers format (stock class names), the tokenizer and a card.

    Reopens the files; raises RuntimeError if they do not hold the model.
    """
    directory = Path(directory)
    model: Any = merged.model
    save_model(model, directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    _verify(model, directory)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    card = merged_card(base_id, merged.difference, merged.num_probe_tokens, dtype, merged.ssm_lora)
    (directory / "README.md").write_text(card)
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
    for layer in lora_layers(model).values():
        base = layer.get_base_layer()
        if owners[id(base.weight)] > 1:
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)


@torch.inference_mode()
def _logits(model: nn.Module, probe: Tensor) -> Tensor:
    return model(input_ids=probe, use_cache=False).logits.float()


def _verify(model: nn.Module, directory: Path) -> None:
    from safetensors.torch import load_file

    written: dict[str, Tensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        written |= load_file(file)
    state = model.state_dict()
    for name, tensor in written.items():
        if name not in state or not torch.equal(tensor, state[name].cpu()):
            raise RuntimeError(f"{directory}: {name} is not what the merged model holds")
    stored = {id_of(state[name]) for name in written}
    if missing := [name for name, tensor in state.items() if id_of(tensor) not in stored]:
        raise RuntimeError(f"{directory}: {missing[0]} was not written")


def id_of(tensor: Tensor) -> tuple[int, torch.Size]:
    """Tied tensors are one storage."""
    return tensor.data_ptr(), tensor.shape
