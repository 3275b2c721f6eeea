"""Proof, on a config of the user's, that a run which is killed and resumed is the run that was not.
Each part of it is a process of its own, or one of every rank that a launcher started, which is
killed in the step after a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ssm_train.adapters.base import Batch
from ssm_train.bases import base_run
from ssm_train.checkpoint import checkpoint_path, load_checkpoint, read_rng
from ssm_train.config import RunConfig, dump_yaml, load_config, run_directory
from ssm_train.errors import InputError
from ssm_train.launched import Launched
from ssm_train.metrics import read_metrics
from ssm_train.peft.spec import TWO_STAGES, load_peft
from ssm_train.record import WARMUP
from ssm_train.record.runlog import observed
from ssm_train.train import run

PARTS = 3  # of the steps: a stop after the first, and after the second
SECONDS_TO_SAVE = 600
NO_EVALUATION: dict[str, Any] = {
    "skip_eval": True, "eval_at_start": False, "eval_gen": None, "metric_for_best": None,
    "max_eval_examples": None, "min_eval_metric_after_epoch": {}, "test_data": None,
}  # fmt: skip
CPU_MODULES = ["ssm_train.verify_resume", "ssm_train.adapters.gla", "ssm_train.adapters.mamba"]
GROUPS = {"trainable": "parameter", "optimizer": "optimizer state", "base": "changed base weight"}
STREAMS = {"python": "Python's", "numpy": "NumPy's", "torch": "torch's", "cuda": "the GPU's"}


@dataclass(frozen=True)
class Point:
    """A step that has a checkpoint; `where` is the stage's directory in the run's."""

    where: str
    step: int

    def __str__(self) -> str:
        return f"step {self.step}" + (" of the warm-up" if self.where == WARMUP else "")


@dataclass(frozen=True)
class Trail:
    """What a run leaves in its directory, for rank 0 to read."""

    place: Path
    run_dir: Path

    @property
    def config(self) -> Path:
        return self.place / "run.yaml"

    @property
    def trace(self) -> Path:
        return self.place / "trace.jsonl"

    @property
    def log(self) -> Path:
        """What all ranks say."""
        return self.place / "log.txt"

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Of every step, in order: part, where, step, loss, grad_norm; examples and tokens of rank
        0."""
        return [json.loads(line) for line in self.trace.read_text(encoding="utf-8").splitlines()]


def verify(
    cfg: RunConfig,
    steps: int,
    say: Callable[[str], None],
    meanwhile: Callable[[Path], None] = lambda run_dir: None,
) -> str | None:
    """All ranks of a launch. The first difference in words, or None. `meanwhile`: called on rank 0
    with the run directory whenever the run is dead. Raises InputError for a run that does not
    begin, or is too short."""
    base = base_run(cfg)
    if base is not None and not (base / "model" / "config.json").is_file():
        raise InputError(f"model: train the base first: ssm-train train --cfg {cfg.model}")
    ranks = Launched()
    with TemporaryDirectory(prefix="ssm_train_verify_") if ranks.main else nullcontext("") as made:
        place = Path(ranks.agree(made))
        part = -(-steps // PARTS)
        while True:
            points, prepared = plan_points(cfg, part)
            began = time.monotonic()
            whole = follow(prepared, place / f"whole-{part}", points[-1:], ranks)
            reached = int(ranks.agree(str(whole.rows[-1]["step"] if ranks.main else "")))
            if reached >= points[-1].step:
                break
            if reached < PARTS:
                raise InputError(f"the run has {reached} steps, which cannot be stopped twice")
            part = reached // PARTS
        say(f"{points[-1]} reached in one go, {time.monotonic() - began:.0f} s")
        stopped = follow(prepared, place / "stopped", points, ranks, meanwhile)
        stops = " and ".join(str(point) for point in points[:-1])
        say(f"{points[-1]} reached again, killed after {stops} and resumed")
        difference = first_difference(whole, stopped, points) if ranks.main else None
        return ranks.agree(difference or "") or None


def plan_points(cfg: RunConfig, part: int) -> tuple[list[Point], RunConfig]:
    """Where to stop, the last one being the end, and the config that has checkpoints there."""
    peft = load_peft(cfg.peft, cfg.peft_overrides.given())
    points: list[Point] = []
    overrides = cfg.peft_overrides
    two_stages = peft is not None and peft.peft_type in TWO_STAGES and not cfg.debug
    warmup = peft.settings.model_dump()["num_warmup_it"] if peft and two_stages else 0
    if warmup:
        part = min(part, warmup)
        points.append(Point(WARMUP, part))
        overrides = overrides.model_copy(update={"num_warmup_it": part})  # one step more
    points += [Point("", part * i) for i in range(1, PARTS + 1)]
    launch = {"resume": False, "overwrite": False, "lock": False, "trackers": [], "name": "run"}
    log = {"logging_steps": 1, "save_steps": part, "no_save": False, "save_total_limit": PARTS}
    return points, cfg.model_copy(
        update=NO_EVALUATION | launch | log | {"peft_overrides": overrides}
    )


def follow(
    cfg: RunConfig,
    place: Path,
    points: list[Point],
    ranks: Launched,
    meanwhile: Callable[[Path], None] = lambda run_dir: None,
) -> Trail:
    """A run below `place`, killed after each of the points and resumed but for the last."""
    cfg = cfg.model_copy(update={"output_root": str(place)})
    trail = Trail(place, run_directory(cfg))
    if ranks.main:
        place.mkdir()
        trail.config.write_text(dump_yaml(cfg), encoding="utf-8")
    # Processes are forked from one that has imported most and holds no GPU, as fla would.
    # That they leave semaphores when they are killed is no news.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")
    context = get_context("forkserver")
    context.set_forkserver_preload(CPU_MODULES if cfg.device == "cpu" else CPU_MODULES[:1])
    for i, point in enumerate(points):
        variables = ranks.meet()
        process = context.Process(
            target=train_and_die, args=(trail, i, point, variables), daemon=True
        )
        process.start()
        code = ranks.await_end(process)
        if code not in (0, -signal.SIGKILL):
            said = ranks.agree(trail.log.read_text(encoding="utf-8").rstrip() if ranks.main else "")
            if code == 2:
                raise InputError(said.splitlines()[-1])
            raise RuntimeError(f"the run ended with exit code {code}:\n{said}")
        if ranks.main and i < len(points) - 1:
            meanwhile(trail.run_dir)
    return trail


# ---------------------------------------------------------------- in a process of its own


def train_and_die(trail: Trail, part: int, point: Point, variables: Mapping[str, str]) -> None:
    """Trains, or goes on; rank 0 kills itself in the step after `point`, once that one is saved."""
    os.environ.update(variables)
    out = os.open(trail.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    cfg, provenance = load_config(trail.config, {"resume": "true"})
    if cfg.device != "cpu" and torch.cuda.is_available():
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS's way to be deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with trail.trace.open("a", encoding="utf-8") as file:
            batches: list[Batch] = []  # those of the step whose row is logged next

            def keep(made: list[Batch]) -> None:
                batches[:] = made

            def look(stage_dir: Path, row: Mapping[str, Any]) -> None:
                where = WARMUP if stage_dir.name == WARMUP else ""
                step, done = row["step"], {"part": part, "where": where}
                values = {key: row[key] for key in ("step", "loss", "grad_norm")}
                file.write(json.dumps(done | values | describe_batches(batches)) + "\n")
                file.flush()
                if where == point.where and step > point.step:
                    await_checkpoint(checkpoint_path(stage_dir, point.step))
                    os.kill(os.getpid(), signal.SIGKILL)

            with observed(look, keep):
                run(cfg, provenance, trail.config)
    except InputError as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(2)


def describe_batches(batches: list[Batch]) -> dict[str, Any]:
    """Which examples, and a hash of all their tokens and targets."""
    content = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.input_ids, batch.target_positions, batch.targets):
            content.update(tensor.cpu().numpy().tobytes())
    return {
        "examples": [i for batch in batches for i in batch.example_ids],
        "tokens": content.hexdigest()[:16],
    }


def await_checkpoint(path: Path) -> None:
    until = time.monotonic() + SECONDS_TO_SAVE
    while not path.is_dir():
        if time.monotonic() > until:
            raise InputError(f"no checkpoint {path.name} after {SECONDS_TO_SAVE} s")
        time.sleep(0.01)


# ---------------------------------------------------------------- comparing


def first_difference(whole: Trail, stopped: Trail, points: list[Point]) -> str | None:
    """In the order of training."""
    for row in whole.rows:
        point = Point(row["where"], row["step"])
        again = [r for r in stopped.rows if (r["where"], r["step"]) == (point.where, point.step)]
        if not again and point.step <= points[-1].step:
            return f"{point}: not trained by the run that was stopped"
        for other in again:
            if difference := compare_rows(row, other):
                chance = "" if other["part"] else (
                    "; that is before the first stop, so two runs of this config differ anyway: "
                    "by kernels that are not deterministic, or data that changes"
                )  # fmt: skip
                return f"{point}: {difference}{chance}"
        if point in points and (difference := compare_checkpoints(whole, stopped, point)):
            return f"checkpoint of {point}: {difference}"
    files = [
        [(r["step"], r.get("loss")) for r in read_metrics(trail.run_dir / "metrics.jsonl")]
        for trail in (whole, stopped)
    ]
    return None if files[0] == files[1] else "metrics.jsonl: other rows than in one go"


def compare_rows(row: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    if row["examples"] != other["examples"]:
        return f"examples {row['examples']} in one go, {other['examples']} in the run with stops"
    if row["tokens"] != other["tokens"]:
        return f"the tokens of examples {row['examples']} are others in the run with stops"
    for key in ("loss", "grad_norm"):
        if repr(row[key]) != repr(other[key]):  # NaN is the same as NaN
            return f"{key} {row[key]!r} in one go, {other[key]!r} in the run with stops"
    return None


def compare_checkpoints(whole: Trail, stopped: Trail, point: Point) -> str | None:
    paths = [checkpoint_path(t.run_dir / point.where, point.step) for t in (whole, stopped)]
    a, b = (load_checkpoint(path) for path in paths)
    for group in sorted({*a.tensors, *b.tensors}, key=list(GROUPS).index):
        ours, theirs = a.tensors.get(group, {}), b.tensors.get(group, {})
        for name in {**ours, **theirs}:
            if name not in ours or name not in theirs:
                return f"{GROUPS[group]} {name} is in one of two"
            if not same_bits(ours[name], theirs[name]):
                off = (ours[name].double() - theirs[name].double()).abs().max()
                return f"{GROUPS[group]} {name} differs by up to {off:.3g}"
    for rank in range(a.world_size):
        ours, theirs = (read_rng(path, rank) for path in paths)
        for name, whose in STREAMS.items():
            if ours[name] != theirs[name]:
                return f"random state: {whose} differs" + (f" on rank {rank}" if rank else "")
    for key in {**a.state, **b.state}:
        if json.dumps(a.state.get(key)) != json.dumps(b.state.get(key)):
            return f"progress: {key} is {a.state.get(key)} in one go, else {b.state.get(key)}"
    return None


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
