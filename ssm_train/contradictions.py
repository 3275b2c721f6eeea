"""Keys of a run config that are right alone and wrong together, and those that would silently do
nothing: each with the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ssm_train.errors import near
from ssm_train.trackers import TRACKERS

if TYPE_CHECKING:
    from ssm_train.config import RunConfig

NAME = r"(?!\.)[A-Za-z0-9._-]{1,128}"


def find_contradictions(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """Keys that are right alone and wrong together: (the key to blame, what to do)."""
    if cfg.model is None and cfg.new_model is None:
        yield "model", "neither model nor new_model is given; give one of them"
    if cfg.model is not None and cfg.new_model is not None:
        yield "new_model", "model and new_model are both given; keep one of them"
    if cfg.new_model is not None and not isinstance(cfg.new_model.get("model_type"), str):
        yield "new_model", "new_model needs a model_type, such as `model_type: gla` or `mamba`"
    if cfg.model and cfg.model.endswith((".yaml", ".yml")) and not Path(cfg.model).is_file():
        yield "model", f"model is {cfg.model!r}, a run config that does not exist"
    if isinstance(cfg.tokenizer, dict) and cfg.tokenizer.get("type") not in ("word", "bpe"):
        yield "tokenizer", "a tokenizer mapping needs `type: word` or `type: bpe`"
    if isinstance(cfg.peft, dict) and not isinstance(cfg.peft.get("peft_type"), str):
        yield "peft", "a peft mapping needs a peft_type, such as `peft_type: LORA`"
    if cfg.peft is None and (given := cfg.peft_overrides.given()):
        keys = ", ".join(given)
        yield (
            f"peft_overrides.{next(iter(given))}",
            f"{keys} given for a run without peft; unset it, or set peft",
        )
    if cfg.resume and cfg.overwrite:
        yield "overwrite", "resume and overwrite are both set; choose one"
    yield from find_dead_settings(cfg)
    for tracker in cfg.trackers:
        if tracker not in TRACKERS:
            hint = near(tracker, TRACKERS)
            yield "trackers", f"unknown tracker {tracker!r}; known: {', '.join(TRACKERS)}{hint}"
    if not re.fullmatch(NAME, cfg.name or ""):
        yield (
            "name",
            f"run name {cfg.name!r} is not a directory name: use letters, digits, `.`, `_`, `-` "
            "(at most 128, not starting with a dot), or set name=...",
        )


def find_dead_settings(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings that would silently do nothing."""
    default = {key: field.default for key, field in type(cfg).model_fields.items()}
    if cfg.packing and cfg.batch_size != default["batch_size"]:
        yield (
            "batch_size",
            f"batch_size {cfg.batch_size} has no effect with packing: set tokens_per_batch instead",
        )
    if not cfg.packing and cfg.tokens_per_batch != default["tokens_per_batch"]:
        yield "tokens_per_batch", "tokens_per_batch has no effect without `packing: true`"
    fixed = cfg.packing and cfg.tokens_per_batch != "auto"
    if fixed and cfg.max_length and cfg.max_length > cfg.row_tokens:
        yield (
            "max_length",
            f"max_length {cfg.max_length} does not fit into tokens_per_batch "
            f"{cfg.tokens_per_batch}; raise tokens_per_batch, or set it to auto",
        )
    for key in ("async_save", "save_errors"):
        if cfg.no_save and getattr(cfg, key) != default[key]:
            yield key, f"{key} has no effect with no_save; remove one of them"
    if cfg.lr_scheduler_type == "constant" and (cfg.warmup_steps or cfg.warmup_ratio):
        yield (
            "lr_scheduler_type",
            "lr_scheduler_type 'constant' has no warm-up; use constant_with_warmup",
        )
    if cfg.max_steps and cfg.warmup_steps > cfg.max_steps:
        yield (
            "warmup_steps",
            f"warmup_steps {cfg.warmup_steps} is more than max_steps {cfg.max_steps}",
        )
    if cfg.spike_rollbacks and (cfg.no_save or not cfg.spike_threshold):
        without = "no_save" if cfg.no_save else "spike_threshold 0"
        yield "spike_rollbacks", f"spike_rollbacks has no effect with {without}; remove one of them"
    needs_eval = (
        *("metric_for_best", "min_eval_metric_after_epoch", "eval_gen", "max_eval_examples"),
        *("eval_at_start", "test_data"),
    )
    for key in needs_eval:
        if cfg.skip_eval and getattr(cfg, key):
            yield key, f"{key} has no effect with skip_eval; remove one of them"
