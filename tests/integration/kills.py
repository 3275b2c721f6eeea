"""Kills at write points, in forked children, and tiny trained models whose checkpoints they hit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_runs import LORA, SPARSE, assert_same_tensors, write_config
from torch import Tensor

from ssm_train import durable, snapshot
from ssm_train.checkpoint import CheckpointSettings, write_manifest
from ssm_train.config import load_config, run_directory
from ssm_train.engines.replicated import Replicated
from ssm_train.loop import TrainState
from ssm_train.optim import build_optimizer
from ssm_train.peft.sd_lora import SdLoraMethod
from ssm_train.peft.spec import load_peft
from ssm_train.ready import get_ready
from ssm_train.resume import RunCheckpoints, find_resume_point

Hook = Callable[[str], None]  # for `durable.at_write_point`
Point = tuple[str, int]  # name, and the how manieth of this name in a save

FIRST = "checkpoints made"  # the first point of a save

CASES: dict[str, tuple[dict[str, Any] | None, str]] = {
    "lora": (LORA, "train"),
    "full": (None, "train"),
    "sd_lora_warmup": (SPARSE, "warmup"),
    "sd_lora": (SPARSE, "train"),
}
"""name -> PEFT settings, and the stage."""


def kill_at(point: Point) -> Hook:
    seen: Counter[str] = Counter()

    def kill(name: str) -> None:
        seen[name] += 1
        if (name, seen[name]) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def kill_in_save(number: int, point: Point) -> Hook:
    """`kill_at` in the so manieth save of a process, counted from 1."""
    saves, kill = 0, kill_at(point)

    def hook(name: str) -> None:
        nonlocal saves, kill
        if name == FIRST:
            saves, kill = saves + 1, kill_at(point)
        if saves == number:
            kill(name)

    return hook


def fork(work: Callable[[], int | None], at_write_point: Hook | None = None) -> int:
    """How a child that does the work ended: with the code that the work returns, or minus the
    signal."""
    return end_of(begin(work, at_write_point))


def fork_ranks(
    processes: int, work: Callable[[], int | None], at_write_point: Hook | None = None
) -> list[int]:
    """`fork`, for each rank of so many; nobody ends the others."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}

    def work_as(rank: int) -> int | None:
        os.environ.update(world | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        return work()

    children = [begin(partial(work_as, rank), at_write_point) for rank in range(processes)]
    return [end_of(child) for child in children]


def begin(work: Callable[[], int | None], at_write_point: Hook | None) -> int:
    """The id of a new child."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            durable.at_write_point = at_write_point
            code = work() or 0
        finally:
            os._exit(code)
    return pid


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def points_of(work: Callable[[], None]) -> list[Point]:
    """The write points of some work, in their order."""
    seen: Counter[str] = Counter()
    points: list[Point] = []

    def note(name: str) -> None:
        seen[name] += 1
        points.append((name, seen[name]))

    durable.at_write_point = note
    try:
        work()
    finally:
        durable.at_write_point = None
    return points


@dataclass
class Kept:
    """All that a checkpoint must bring back."""

    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Any]
    step: int


class Trained:
    """A tiny model with its optimizer, which can be saved, moved on and put back."""

    def __init__(self, directory: Path, case: str, **settings: Any) -> None:
        peft, stage = CASES[case]
        config = write_config(directory, case, "mamba", peft=peft)
        cfg, provenance = load_config(config)
        torch.set_num_threads(1)  # a forked child has no other
        ready = get_ready(
            run_directory(cfg, config), cfg, ["train"],
            load_peft(cfg.peft, {}, provenance) if peft else None, None,
        )  # fmt: skip
        method, prepared = ready.subject.method, ready.subject.prepared
        assert isinstance(ready.engine, Replicated)
        self.engine, self.no_decay = ready.engine, prepared.traits.no_decay
        self._prepare(prepared.model, cfg)
        if stage == "train" and isinstance(method, SdLoraMethod):
            self.move_on(0)
            selection = method.select(self.engine.bare)
            prepared.model = self.engine.free()
            method.begin_training(prepared, selection)
            self._prepare(prepared.model, cfg)
        self.settings = CheckpointSettings(save_total_limit=1, **settings)
        self.method, self.stage = method, stage

    def _prepare(self, model: Any, cfg: Any) -> None:
        self.engine.prepare(model, lambda m: build_optimizer(m, cfg, self.no_decay))

    def checkpoints(self, run_dir: Path) -> RunCheckpoints:
        return RunCheckpoints(run_dir, self.settings, self.engine, self.method, 4, self.stage)

    def save(self, run_dir: Path, step: int, best: int | None = None) -> None:
        checkpoints = self.checkpoints(run_dir)
        checkpoints.save(TrainState(step=step, tokens=10 * step, best_step=best))
        checkpoints.finish()

    def move_on(self, step: int) -> Kept:
        """An optimizer step on random gradients."""
        torch.manual_seed(step)
        for parameter in self.engine.parameters:
            parameter.grad = torch.randn_like(parameter)
        self.engine.step(1.0)
        return self.keep(step)

    def keep(self, step: int) -> Kept:
        return Kept(
            snapshot.copy_tensors(self.engine.trained()),
            snapshot.copy_tensors(self.engine.optimizer_state()),
            snapshot.collect_rng(),
            step,
        )

    def put_back(self, kept: Kept) -> None:
        self.engine.load_trained(kept.trained)
        self.engine.load_optimizer_state(kept.optimizer)
        snapshot.restore_rng(kept.rng)

    def assert_resumes(self, run_dir: Path, kept: Mapping[int, Kept], step: int) -> list[str]:
        """Bit for bit, at this step; returns what resume says."""
        self.move_on(100)
        found, notes = find_resume_point(run_dir)
        assert found is not None and found.step == step, notes
        state = self.checkpoints(run_dir).restore(found)
        assert (state.step, state.tokens) == (step, 10 * step)
        expected, now = kept[step], self.keep(step)
        assert_same_tensors(now.trained, expected.trained)
        assert_same_tensors(now.optimizer, expected.optimizer)
        assert now.rng == expected.rng
        return notes


@dataclass
class Saved:
    """A run directory with checkpoints of steps 1 and 2, and the model at step 3."""

    trained: Trained
    directory: Path
    kept: dict[int, Kept]

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.directory, self.directory.with_name(name)))


def save_two(directory: Path, case: str, **settings: Any) -> Saved:
    trained = Trained(directory, case, **settings)
    run_dir = directory / "saved"
    run_dir.mkdir()
    kept = {}
    for step in (1, 2, 3):
        kept[step] = trained.move_on(step)
        if step < 3:
            trained.save(run_dir, step, best=1)
    return Saved(trained, run_dir, kept)


def names_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# ---------------------------------------------------------------- damage


def truncate(data: bytes, place: int) -> bytes:
    return data[:place]


def flip_a_bit(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]


def fill_with_zeros(data: bytes, place: int) -> bytes:
    """From here on, as where a file's size reached the disk and its content did not."""
    return data[:place] + bytes(len(data) - place)


def delete(data: bytes, place: int) -> None:
    return None


Damage = Callable[[bytes, int], bytes | None]
DAMAGES: tuple[Damage, ...] = (truncate, flip_a_bit, fill_with_zeros, delete)


def spoil(file: Path, damage: Damage, place: int) -> bytes:
    """Returns what was there."""
    data = file.read_bytes()
    spoilt = damage(data, place)
    if spoilt is None:
        file.unlink()
    else:
        assert spoilt != data, (file, damage, place)
        file.write_bytes(spoilt)
    return data


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"))


def sign(checkpoint: Path) -> None:
    """As if it had been written so."""
    world_size = json.loads((checkpoint / "manifest.json").read_text())["world_size"]
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, int(checkpoint.name.removeprefix("step-")), world_size)


def change_numpy_state(run_dir: Path, rank: int = 0) -> None:
    """In the newest checkpoint."""
    file = newest(run_dir) / f"rng-{rank:05}.json"
    state = json.loads(file.read_text())
    state["numpy"]["pos"] += 1
    file.write_text(json.dumps(state))
    sign(file.parent)
