"""Models with their tokenizers and what a PEFT JSON adds, and where each came from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ssm_train.adapters import registry
from ssm_train.adapters.base import ModelAdapter, ModelSpec, PeftMethod, Traits
from ssm_train.assemble import STORAGE
from ssm_train.config import read_peft_overrides
from ssm_train.errors import InputError
from ssm_train.peft.spec import TWO_STAGES, PeftSpec, load_peft


@dataclass(frozen=True)
class Origin:
    """What is known of a model that a function here prepared."""

    model_id: str
    tokenizer_id: str | None
    prec: str
    peft: str | None
    reason: str
    adapter: ModelAdapter
    traits: Traits
    kernels: dict[str, str]
    method: PeftMethod | None


ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def prepare_gla_model_and_tokenizer(
    model_id: str, prec: str, debug: bool, peft_json_path: str | None
) -> tuple[nn.Module, Any, Any]:
    """(model, tokenizer, PEFT config or None): GLA with the checkpoint's own tokenizer and, with a
    PEFT JSON, its factors injected; HP_* variables win over the JSON.

    `debug` chooses nothing: without a GPU every model runs on the CPU. Raises InputError.
    """
    spec = _read_spec(peft_json_path)
    model, tokenizer = _prepare(ModelSpec(model=model_id), ("gla",), prec, peft_json_path, spec)
    return model, tokenizer, _peft_config(model)


def prepare_mamba_model_and_tokenizer(
    model_id: str,
    tokenizer_id: str,
    prec: str,
    backend: str,
    is_custom_tokenizer: bool,
    peft_json_path: str | None,
    no_print: bool = True,
) -> tuple[nn.Module, Any, Any, bool]:
    """(model, tokenizer, PEFT config or None, whether the method is SDLoRA): a Mamba-1 or Mamba-2
    with the tokenizer asked for.

    `backend`: "cuda" takes the fastest kernels that are there, another name plain PyTorch. A custom
    tokenizer has rows of the embedding of its own: with PEFT the embedding is trained in full.
    `no_print` False names the trainable parameters. Raises InputError.
    """
    peft = _read_spec(peft_json_path)
    if peft and is_custom_tokenizer:
        peft = _with_embedding(peft)
    spec = ModelSpec(
        model=model_id,
        tokenizer=tokenizer_id,
        kernels="auto" if backend == "cuda" else "reference",
    )
    model, tokenizer = _prepare(spec, ("mamba", "mamba2"), prec, peft_json_path, peft)
    if not no_print:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                print(f"{name} {tuple(parameter.shape)}")  # noqa: T201
    return model, tokenizer, _peft_config(model), peft is not None and peft.peft_type in TWO_STAGES


def _read_spec(peft_json_path: str | None) -> PeftSpec | None:
    return load_peft(peft_json_path, read_peft_overrides(os.environ))


def _with_embedding(peft: PeftSpec) -> PeftSpec:
    if peft.peft_type != "LORA":
        raise InputError(
            f"is_custom_tokenizer: {peft.peft_type} cannot train the new embedding too; use LORA, "
            "or train the base on the tokenizer first"
        )
    saved = [*(getattr(peft.settings, "modules_to_save", None) or []), "embeddings"]
    return replace(peft, settings=peft.settings.model_copy(update={"modules_to_save": saved}))


def _prepare(
    spec: ModelSpec,
    families: Sequence[str],
    prec: str,
    peft_json_path: str | None,
    peft: PeftSpec | None,
) -> tuple[nn.Module, Any]:
    if prec not in STORAGE:
        raise InputError(f"prec is {prec!r}; expected {', '.join(STORAGE)}")
    adapter, reason = registry.resolve(spec)
    if adapter.name not in families:
        raise InputError(f"model: {spec.model} is {reason}; expected {' or '.join(families)}")
    spec = replace(
        spec,
        dtype=STORAGE[prec] if peft else torch.float32,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    prepared = adapter.prepare(spec)
    method = peft.make() if peft else None
    if method:
        method.inject(prepared)
    ORIGINS[prepared.model] = Origin(
        str(spec.model), spec.tokenizer, prec, peft_json_path, reason, adapter, prepared.traits,
        prepared.kernels, method,
    )  # fmt: skip
    return prepared.model, prepared.tokenizer


def _peft_config(model: nn.Module) -> Any:
    """Hugging Face PEFT's configuration of what was injected."""
    configs = getattr(model, "peft_config", None)
    return next(iter(configs.values())) if isinstance(configs, dict) else None
