"""A DeepSpeed config (`ds_configs/`) beside the run's: what it may say, and its autos as numbers.

It says how to shard and nothing of what is learnt: no learning rate, no schedule, no precision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_train import distributed
from ssm_train.errors import InputError

BUCKET = 50_000_000  # elements of a collective at most
AUTO = "auto"
REFUSED = {
    "optimizer": "the run config sets the optimizer",
    "scheduler": "the run config sets the learning rate of every step",
    "amp": "prec of the run config sets the precision",
    "fp16": "it would store every weight in fp16; prec of the run config sets the precision",
    "bf16": "it would store every weight in bf16, also step sizes and decays, which need fp32; "
    "prec of the run config sets the precision",
    "bfloat16": "it would store every weight in bf16; prec of the run config sets the precision",
    "torch_autocast": "prec of the run config sets the precision",
}


@dataclass(frozen=True)
class Numbers:
    """Of the run config: what a DeepSpeed config may say too."""

    prec: distributed.Precision
    batch_size: int  # of a process; packed: 1, a row
    accumulation: int
    max_grad_norm: float
    trains_all: bool = False  # weights, not an adapter's alone


def read_config(path: Path, numbers: Numbers) -> dict[str, Any]:
    """The file, complete: without auto, but for sizes that depend on the model. Raises InputError
    for what contradicts the run config, naming both values."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"DeepSpeed config {path}: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization", {}), dict):
        raise InputError(f"DeepSpeed config {path}: it has to be an object, and zero_optimization")
    stage = given.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise InputError(f"{path}: zero_optimization.stage is {stage!r}; it has to be 1, 2 or 3")
    for key, reason in REFUSED.items():
        section = given.get(key)
        if section and not (isinstance(section, dict) and section.get("enabled") is False):
            raise InputError(f"{path}: remove {key!r}: {reason}")
    agree(path, given, numbers)
    return given | {
        # A step's micro-batches are counted by the loop, which also divides by all its targets.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": distributed.world_size(),
        "gradient_clipping": numbers.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW, as under every engine
        "steps_per_print": 2**31,
    }


def agree(path: Path, given: Mapping[str, Any], numbers: Numbers) -> None:
    """Raises InputError where a number of the file is not the run config's."""
    world = distributed.world_size()
    ours = {
        "train_micro_batch_size_per_gpu": ("batch_size", numbers.batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", numbers.accumulation),
        "gradient_clipping": ("max_grad_norm", numbers.max_grad_norm),
        "train_batch_size": (
            "batch_size x gradient_accumulation_steps x processes",
            numbers.batch_size * numbers.accumulation * world,
        ),
    }
    for key, (name, value) in ours.items():
        if given.get(key, AUTO) not in (AUTO, value):
            raise InputError(
                f"{path}: {key} is {given[key]!r}, but {name} of the run is {value!r}; "
                f"set {key} to auto"
            )


def fill_sizes(
    config: Mapping[str, Any], trained: int, hidden_size: int
) -> tuple[dict[str, Any], str]:
    """The config with numbers for the autos that depend on the model, no larger than it needs, and
    what they are."""
    bucket = max(1, min(BUCKET, trained))
    sizes = {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    filled, said = deepcopy(dict(config)), []
    zero = filled["zero_optimization"]
    for key, value in zero.items():
        if value == AUTO:
            if key not in sizes:
                raise InputError(f"DeepSpeed config: no number is known for {key}: auto; give one")
            zero[key] = sizes[key]
            said.append(f"{key} {sizes[key]:,}")
    if left := [key for key, value in filled.items() if value == AUTO]:
        raise InputError(f"DeepSpeed config: no number is known for {left[0]}: auto; give one")
    return filled, ", ".join(said) or "all sizes as given"
