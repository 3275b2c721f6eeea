"""Fine-tune GLA, Mamba-1 and Mamba-2 language models. Importing this loads no torch."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "build_and_run_trainer": "ssm_train.mamba_peft.training",
    "create_decoder": "ssm_train.mamba_peft.decoding",
    "load_config": "ssm_train.config",
    "load_dataset": "ssm_train.mamba_peft.data",
    "load_run": "ssm_train.finished",
    "prepare_gla_model_and_tokenizer": "ssm_train.mamba_peft.models",
    "prepare_mamba_model_and_tokenizer": "ssm_train.mamba_peft.models",
    "run": "ssm_train.train",
}
"""Public name -> its module, imported when the name is first used."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'ssm_train' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
