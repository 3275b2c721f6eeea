"""An adapter as files for people: right against the original base, refused where it would be dead,
reopened and compared after writing.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssm_train.adapters.base import Traits
from ssm_train.adapters.loading import MISREAD
from ssm_train.adapters.modules import matches
from ssm_train.adapters.slices import SlicedLinear
from ssm_train.errors import InputError
from ssm_train.peft.cards import adapter_card, is_hub_id
from ssm_train.peft.lora import CHANGES_BASE, lora_layers, quiet_peft
from ssm_train.peft.registration import SSM_LORA
from ssm_train.peft.tuner import OwnConfig, own_layers
from ssm_train.strict_yaml import read_document

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NAMES_CODE = ("auto_mapping", "megatron_config")
"""Keys of an adapter_config.json for which PEFT imports a module that the file names."""


def export_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base_id: str | None,
    traits: Traits,
    initial: Mapping[str, Tensor] | None = None,
    revision: str | None = None,
) -> Path:
    """Writes adapter_model.safetensors, adapter_config.json and README.md into `directory`.

    `model` is the PeftModel that `LoraMethod.inject` made; `base_id` and `revision` say which base
    it belongs to; `initial` is `LoraMethod.initial` (needed for inits that change the base).
    Tensors are those of training, on the original base (PiSSA appendix C: rank 2r). Raises
    RuntimeError if a tensor is empty or not finite, or is not on disk what it was in memory.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    peft_model: Any = model
    config = copy.deepcopy(peft_model.peft_config["default"])
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    if str(getattr(config, "init_lora_weights", "")).startswith(CHANGES_BASE):
        assert initial, f"exporting {config.init_lora_weights} needs LoraMethod.initial"
        tensors = _subtract_start(tensors, initial)
        _double_rank(config)
    tensors = {k: t.detach().to("cpu").contiguous() for k, t in sorted(tensors.items())}
    _check_tensors(tensors)
    _describe(config, base_id, revision, needs_ssm_lora(model, traits))

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    card = adapter_card(config, peft_model.get_base_model())
    _replace(directory / "README.md", lambda path: path.write_text(card))
    text = json.dumps(_as_json(config), indent=2, sort_keys=True) + "\n"
    _replace(directory / CONFIG, lambda path: path.write_text(text))
    _verify(directory, tensors)
    return directory


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Puts an exported adapter onto its base. Unlike PEFT, accepts no missing or extra tensor.

    A stock transformers or fla model becomes one of ours first, if the adapter needs that.
    Raises InputError.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    from ssm_train.peft.registration import register

    register()
    directory = Path(directory)
    tensors = read_adapter(directory)
    _check_base(model, directory)
    try:
        with quiet_peft():
            loaded = PeftModel.from_pretrained(model, str(directory))
    except MISREAD as error:  # other names, other shapes, settings that are none
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"{directory} does not fit this base model: {reason}") from error
    _store_saved_modules_in_fp32(loaded)
    set_peft_model_state_dict(loaded, tensors)
    reached = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    if difference := sorted(set(reached) ^ set(tensors)):
        raise InputError(
            f"{directory} does not fit this base model: {len(difference)} tensors are in only one "
            f"of the two, such as {difference[0]}"
        )
    for name, tensor in tensors.items():
        assert torch.equal(reached[name].to(tensor), tensor), name
    return loaded


def _check_base(model: Any, directory: Path) -> None:
    """Raises InputError where hub names or commits say that the model is another base, or where the
    file names code. Local directories say nothing: they are copied and renamed."""
    written = read_document(directory / CONFIG).values
    for key in NAMES_CODE:
        if written.get(key) is not None:
            raise InputError(
                f"{directory / CONFIG}: {key} names code of its own, which is never run; remove it"
            )
    config = getattr(model, "config", None)
    base, given = written.get("base_model_name_or_path"), getattr(config, "_name_or_path", None)
    hub_ids = [name for name in (base, given) if isinstance(name, str) and is_hub_id(name)]
    if len(set(hub_ids)) > 1:
        raise InputError(
            f"{directory} is an adapter for {base}, and this model is {given}; load it onto its "
            f"own base, or change base_model_name_or_path in its {CONFIG} if they are the same"
        )
    trained, loaded = written.get("revision"), getattr(config, "_commit_hash", None)
    commits = [commit for commit in (trained, loaded) if re.fullmatch("[0-9a-f]{40}", str(commit))]
    if len(set(commits)) > 1:
        raise InputError(
            f"{directory} was trained on revision {trained} of {base}, and this model is revision "
            f"{loaded}; load the base with revision={trained!r}"
        )


def _store_saved_modules_in_fp32(model: nn.Module) -> None:
    """As in training; PEFT copies them from the base, whose dtype would round what is loaded."""
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()


def read_adapter(directory: Path) -> dict[str, Tensor]:
    """The tensors of an exported adapter by name. Raises InputError if it is not one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            raise InputError(f"{directory} is not an adapter: it has no {file}")
    try:
        return load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise InputError(f"{directory / WEIGHTS} cannot be read: {error}") from None


def needs_ssm_lora(model: nn.Module, traits: Traits) -> bool:
    """Whether stock PEFT on the stock model would refuse this adapter or leave a part of it dead,
    as it would those of our own methods.

    (GLA: stock fla calls a fused op with `down_proj.weight`; Mamba: pitfalls of its kernels.)
    """
    suffixes = traits.refused_targets + traits.raw_weight_reads
    return (
        bool(own_layers(model))
        or any(isinstance(module, SlicedLinear) for module in model.modules())
        or any(matches(name, suffixes) for name in lora_layers(model))
    )


def _subtract_start(
    tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """BA - B0 A0 as one product of rank 2r: A' = [A; A0], B' = [B, -B0].

    The base was changed to W - s B0 A0, so W + s (BA - B0 A0) is the trained weight. A DoRA
    magnitude scales that whole sum and stays as it is.
    """
    doubled = dict(tensors)
    for name, tensor in tensors.items():
        if "lora_A" in name or "lora_B" in name:
            start = initial[name].to(tensor)
            is_A = "lora_A" in name
            doubled[name] = torch.cat([tensor, start if is_A else -start], dim=0 if is_A else 1)
    return doubled


def _double_rank(config: Any) -> None:
    """Ranks times two with the same scaling: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
    config.alpha_pattern = {name: factor * a for name, a in config.alpha_pattern.items()}


def _describe(config: Any, base_id: str | None, revision: str | None, ssm_lora: bool) -> None:
    from peft.utils import PeftType

    config.base_model_name_or_path = base_id or None
    config.revision = revision
    config.inference_mode = True
    if not isinstance(config, OwnConfig):
        config.peft_type = PeftType(SSM_LORA) if ssm_lora else PeftType.LORA
        config.init_lora_weights = True


def _as_json(config: Any) -> dict[str, Any]:
    """The config as PEFT writes it: sets as sorted lists, whole numbers without a point."""

    def plain(value: Any) -> Any:
        if isinstance(value, set):
            return sorted(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return {key: plain(value) for key, value in config.to_dict().items()}


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    assert tensors, "the model has no adapter tensors"
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise RuntimeError(f"{name} is empty; gather sharded parameters before exporting")
        if not tensor.isfinite().all():
            raise RuntimeError(f"{name} has values that are not finite; the adapter is not written")


def _verify(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    from peft import PeftConfig

    written = read_adapter(directory)
    same = written.keys() == tensors.keys() and all(
        written[name].dtype == tensor.dtype and torch.equal(written[name], tensor)
        for name, tensor in tensors.items()
    )
    if not same:
        raise RuntimeError(f"{directory / WEIGHTS} does not hold what was written to it")
    PeftConfig.from_pretrained(str(directory))


def _replace(path: Path, write: Any) -> None:
    """Writes beside `path` and renames, so that no reader sees half a file."""
    partial = path.with_name(path.name + ".tmp")
    write(partial)
    os.replace(partial, path)
