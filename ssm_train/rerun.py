"""A run again, from its record, in another directory: are its first losses those that it had?"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssm_train import distributed
from ssm_train.assemble import base_id
from ssm_train.bases import check_base
from ssm_train.config import PeftOverrides, RunConfig, load_config
from ssm_train.errors import InputError
from ssm_train.metrics import read_metrics
from ssm_train.record import MARKER, WARMUP, recorded_peft
from ssm_train.record.environment import differing_facts, read_environment
from ssm_train.record.runlog import observed
from ssm_train.train import run

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""By `prec`: relative, of losses on another machine, with other versions, or on a GPU."""

Loss = tuple[str, int, float]
"""Stage's directory in the run's, step, loss."""


def rerun(
    run_dir: Path, out: Path, count: int, whole: bool, say: Callable[[str], None]
) -> str | None:
    """All ranks. Trains until `count` losses of the record are there again, or to the end. The
    first that differs in words, or None. Raises InputError for a record that cannot be repeated."""
    cfg, record = recorded_config(run_dir), read_environment(run_dir)
    if out.exists():
        raise InputError(f"--out {out} is there already; give another directory")
    launched = distributed.launched_processes()
    if (processes := record.get("processes", 1)) != launched:
        raise InputError(
            f"{run_dir} was trained by {processes} processes, and {launched} were launched; start "
            f"with torchrun --nproc_per_node {processes} -m ssm_train rerun ..."
        )
    expected = recorded_losses(run_dir)[:count]
    if not expected:
        raise InputError(f"{run_dir} has no losses to compare with")
    if cfg.model is not None:
        check_base(run_dir, str(base_id(cfg, run_dir)))
    found: list[Loss] = []

    def look(stage_dir: Path, row: Mapping[str, Any]) -> None:
        found.append((stage_dir.relative_to(out).name, row["step"], row["loss"]))
        if len(found) == len(expected) and not whole:
            os.kill(os.getpid(), signal.SIGUSR1)  # all ranks finish the step, and save

    with observed(look):
        run(cfg, {}, run_dir / MARKER, run_dir=out, repeats=run_dir)
    if not distributed.is_main():
        return None
    now = read_environment(out)
    exact = now["device"] == "cpu" and not differing_facts(record, now)
    tolerance = 0.0 if exact else TOLERANCE[cfg.prec]
    how = "bit for bit" if exact else f"to {tolerance:g} of their size"
    difference = first_difference(expected, found, tolerance)
    if difference is None:
        say(f"the first {len(expected)} losses are those of the record, {how}")
        return None
    return f"{difference}; they should be the same {how}"


def recorded_config(run_dir: Path) -> RunConfig:
    """As the run was trained, also where the file that its `peft` names has changed."""
    cfg, _ = load_config(run_dir / MARKER)
    if (peft := recorded_peft(run_dir)) is not None:
        cfg = cfg.model_copy(update={"peft": peft, "peft_overrides": PeftOverrides()})
    return cfg.model_copy(update={"lock": False, "trackers": []})


def recorded_losses(run_dir: Path) -> list[Loss]:
    """Of all stages, in the order of training."""
    found: list[Loss] = []
    for where in (WARMUP, ""):
        file = run_dir / where / "metrics.jsonl"
        if file.is_file():
            rows = [row for row in read_metrics(file) if row["split"] == "train"]
            found += [(where, row["step"], as_number(row["loss"])) for row in rows]
    return found


def as_number(loss: float | None) -> float:
    """What is not finite is null in the file."""
    return math.nan if loss is None else loss


def first_difference(expected: list[Loss], found: list[Loss], tolerance: float) -> str | None:
    """In words; None where every expected loss was found, as close as `tolerance` says."""
    for i, (where, step, loss) in enumerate(expected):
        name = f"step {step}" + (" of the warm-up" if where else "")
        if i >= len(found) or found[i][:2] != (where, step):
            return f"{name}: loss {loss!r} in the record, and the run again has not logged it"
        again = found[i][2]
        if not (math.isfinite(loss) or math.isfinite(again)):
            continue
        if not abs(again - loss) <= tolerance * abs(loss):
            return f"{name}: loss {loss!r} in the record, {again!r} now"
    return None
