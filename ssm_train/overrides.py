"""What lies over a config file: `key=value` texts and environment variables. Which key a variable
sets, what value a text stands for, and which variables nothing reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic.fields import FieldInfo

from ssm_train.errors import InputError
from ssm_train.strict_yaml import parse_value

GLUE_TASKS = ("rte", "cola", "mrpc", "sst2", "qnli", "qqp", "mnli", "wnli")
SHORT_DATA = {
    **{task: f"glue-tvt_{task}" for task in GLUE_TASKS},
    **{name: f"{name}-tvt" for name in ("spider", "cifar")},
}
"""What HP_DATA may say -> the data set that it means."""

ENVIRONMENT: dict[str, str] = {
    "HP_DATA": "data",
    "HP_VAL_SPLIT": "val_data_split",
    "HP_BATCH_SIZE": "batch_size",
    "HP_EVAL_BATCH_SIZE": "eval_batch_size",
    "HP_TOKENS_PER_BATCH": "tokens_per_batch",
    "HP_LR": "learning_rate",
    "HP_EPOCHS": "num_epochs",
    "HP_PREC": "prec",
    "HP_SEED": "seed",
    "HP_MAX_STEPS": "max_steps",
    "HP_LOGGING_STEPS": "logging_steps",
    "HP_EVAL_STEPS": "eval_steps",
    "HP_SAVE_STEPS": "save_steps",
    "NUM_DATA_WORKERS": "num_data_workers",
    "GRADIENT_CHECKPOINTING": "gradient_checkpointing",
    "LOGITS_TO_KEEP": "logits_to_keep",
    "LR_SCHEDULER_TYPE": "lr_scheduler_type",
    "LR_WARMUP_STEPS": "warmup_steps",
    "LR_WARMUP_RATIO": "warmup_ratio",
    "HP_PEFT_R": "peft_overrides.r",
    "HP_PEFT_ALPHA": "peft_overrides.lora_alpha",
    "HP_PEFT_DROPOUT": "peft_overrides.lora_dropout",
    "HP_INIT": "peft_overrides.init_lora_weights",
    "HP_PISSA_FAST": "peft_overrides.pissa_fast",
    "HP_USE_DORA": "peft_overrides.use_dora",
    "HP_USE_RSLoRA": "peft_overrides.use_rslora",
    "HP_PEFT_TYPE": "peft_overrides.peft_type",
    "HP_LORAGA_BATCH_SIZE": "peft_overrides.loraga_batch_size",
    "HP_LORAGA_STEPS": "peft_overrides.loraga_steps",
    "HP_LORAGA_LAYERWISE": "peft_overrides.loraga_layerwise",
    "HP_LORAGA_STABLE_C": "peft_overrides.loraga_stable_c",
    "HP_WARMUP_IT": "peft_overrides.num_warmup_it",
    "HP_TRAIN_RATIO": "peft_overrides.train_ratio",
    "HP_FREEZE_RATIO": "peft_overrides.freeze_ratio",
    "HP_ZERO_RATIO": "peft_overrides.zero_ratio",
}
"""Variable -> config key. An empty variable counts as not set."""

DIRECTORIES = {
    "SSM_TRAIN_OUTPUT": "output_root",
    "SSM_TRAIN_DATA": "data_root",
    "SSM_TRAIN_CACHE": "cache_dir",
}
"""Variable -> config key whose default it is: of this machine, so a file wins over it."""

NO_LONGER_READ = {
    "EVAL_GEN": "eval_gen",
    "EVAL_GEN_MAX_LENGTH": "eval_gen.max_length",
    "EVAL_GEN_MIN_LENGTH": "eval_gen.min_length",
    "EVAL_GEN_NUM_BEAMS": "eval_gen.num_beams",
    "HP_NO_SAVE": "no_save",
    "SWANLAB_ENABLE": "trackers",
    "DART_LOCAL_DIR": "data_root",
    "SAMSUM_LOCAL_DIR": "data_root",
    "SPIDER_LOCAL_DIR": "data_root",
}
"""Variable of other launch scripts -> the config key that has its meaning here."""


def read_variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(variable, config key, text) of those that are set."""
    for variable, key in ENVIRONMENT.items():
        if text := environment.get(variable, "").strip():
            yield variable, key, SHORT_DATA.get(text, text) if variable == "HP_DATA" else text


def misspelt_variables(environment: Mapping[str, str]) -> Iterator[str]:
    """A line for each that is nearly one of ours: a typo must not train something else."""
    for variable in sorted(set(environment) - set(ENVIRONMENT) - set(NO_LONGER_READ)):
        close = get_close_matches(variable, ENVIRONMENT, n=1, cutoff=0.8)
        if variable.startswith("HP_") and close:
            yield f"unknown variable {variable}; did you mean {close[0]}? (unset it otherwise)"


def unread_variables(environment: Mapping[str, str]) -> Iterator[str]:
    """A line for each that looks as if it should change a run and does not."""
    for variable in sorted(set(environment) - set(ENVIRONMENT)):
        key = NO_LONGER_READ.get(variable)
        if environment[variable].strip() and (key or variable.startswith("HP_")):
            yield f"{variable} is set, but not read{f'; set {key} instead' if key else ''}"


def set_at(values: dict[Any, Any], key: str, value: Any) -> None:
    """Puts `value` at the dotted `key`; mappings on the way are copied, or made where there is
    none. Raises InputError where something else is in the way."""
    *parents, last = key.split(".")
    for part in parents:
        inner = values.get(part := find_key(values, part))
        if inner is not None and not isinstance(inner, dict):
            raise InputError(
                f"{key} cannot be set, as {part} is {inner!r}; give {part} as a mapping"
                + (f", or set peft_overrides.{last}" if part == "peft" else "")
            )
        values[part] = values = dict(inner or {})
    values[find_key(values, last)] = value


def find_key(values: Mapping[Any, Any], text: str) -> Any:
    """The key of `values` that is written `text`: a number where there is one; else the text."""
    return next((key for key in values if str(key) == text), text)


def from_text(text: str, field: FieldInfo | None) -> Any:
    """A command-line or environment text as a value: numbers and mappings as in YAML; yes, no,
    1, 0 for switches; the text itself where the field takes text."""
    accepts = str(field.annotation) if field else ""
    words = {"1": True, "yes": True, "on": True, "0": False, "no": False, "off": False}
    if "bool" in accepts and text.lower() in words:
        return words[text.lower()]
    value = parse_value(text)
    if ("str" in accepts or "Literal" in accepts) and isinstance(value, int | float):
        return value if type(value).__name__ in accepts else text
    return value
