"""A model of `models.py` through a run of this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ssm_train.adapters.base import Prepared
from ssm_train.assemble import Subject
from ssm_train.config import resolve_config
from ssm_train.errors import InputError
from ssm_train.mamba_peft.models import ORIGINS
from ssm_train.overrides import DIRECTORIES
from ssm_train.record.summary import Result
from ssm_train.strict_yaml import Document
from ssm_train.train import run

OF_OLD_CODE = ("cfg_path", "is_sdlora", "output_dir")  # what it kept in a run's cfg


def build_and_run_trainer(
    *,
    model: nn.Module,
    tokenizer: Any,
    output_dir: str,
    cfg: Mapping[str, Any],
    cfg_path: str,
    learning_rate: float,
    total_steps: int,
    logging_steps: int,
    gradient_accumulation_steps: int,
    num_data_workers: int,
    batch_size: int,
    eval_epochs: float,
    skip_eval: bool,
    no_save: bool,
    eval_steps_override: int | None,
    save_steps_override: int | None,
    eval_gen: Mapping[str, Any] | None,
    resume_from_checkpoint: bool,
    min_eval_metric_after_epoch: Mapping[int, float] | None,
    seed: int,
    data: str,
    val_data: str | None,
    val_data_split: str,
    debug: bool,
    gradient_checkpointing: bool = False,
    logits_to_keep: int | None = None,
) -> Result:
    """Data, decoder, evaluation and training of a model that `prepare_*` made, in `output_dir`.

    The other keys of a run config come from `cfg` (`optim`, `weight_decay`, `overwrite`, ...). With
    `skip_eval` what evaluation would need counts for nothing. Raises InputError, also for a model
    from elsewhere.
    """
    origin = ORIGINS.get(model)
    if origin is None:
        raise InputError(
            "model: it was not made by prepare_gla_model_and_tokenizer or "
            "prepare_mamba_model_and_tokenizer, so that its family and its adapter are not known"
        )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    values = {
        **{key: value for key, value in cfg.items() if key not in OF_OLD_CODE},
        "model": origin.model_id,
        "prec": origin.prec,
        "peft": origin.peft,
        "tokenizer": origin.tokenizer_id,
        "learning_rate": float(learning_rate),
        "max_steps": total_steps,
        "logging_steps": logging_steps,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "num_data_workers": num_data_workers,
        "batch_size": batch_size,
        "eval_epochs": eval_epochs,
        "skip_eval": skip_eval,
        "no_save": no_save,
        "eval_steps": eval_steps_override,
        "save_steps": save_steps_override,
        "eval_gen": None if skip_eval or eval_gen is None else dict(eval_gen),
        "resume": resume_from_checkpoint,
        "min_eval_metric_after_epoch": {} if skip_eval else dict(min_eval_metric_after_epoch or {}),
        "seed": seed,
        "data": data,
        "val_data": val_data,
        "val_data_split": val_data_split,
        "debug": debug,
        "gradient_checkpointing": gradient_checkpointing,
        "logits_to_keep": logits_to_keep,
    }
    run_dir = Path(output_dir)
    directories = {k: v for k, v in os.environ.items() if k in DIRECTORIES}
    run_cfg, provenance = resolve_config(
        Document(cfg_path, values, {}), run_dir.name, environment=directories
    )
    prepared = Prepared(model, tokenizer, origin.traits, origin.kernels)
    subject = Subject(origin.adapter, prepared, origin.reason, origin.method)
    return run(run_cfg, provenance, cfg_path, run_dir=run_dir, given=subject)
