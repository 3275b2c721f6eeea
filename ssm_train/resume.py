"""What of a run is in its checkpoints, when they are written, and how they are put back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from ssm_train import checkpoint, distributed, snapshot
from ssm_train.adapters.base import PeftMethod
from ssm_train.checkpoint import CheckpointSettings, Group
from ssm_train.durable import appears
from ssm_train.engines.base import Engine
from ssm_train.errors import InputError
from ssm_train.loop import TrainState


class Save(threading.Thread):
    """Rank 0. One save: run in place, or started beside the training. As after a kill, a process
    that ends at once leaves the checkpoint before it."""

    def __init__(self, step: int, write: Callable[[], None]) -> None:
        super().__init__(name=f"save of step {step}", daemon=True)
        self.step, self.write = step, write
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.write()
        except Exception as error:
            self.error = error

    def failure(self) -> str | None:
        """After it has ended: why nothing could be written, or None. Raises any other error."""
        if self.error is None:
            return None
        if not isinstance(self.error, OSError):
            raise self.error
        return f"the checkpoint of step {self.step} cannot be written: {self.error}"


@dataclass
class RunCheckpoints:
    """The checkpoints of one run: trained parameters, optimizer, random states, progress."""

    run_dir: Path
    settings: CheckpointSettings
    engine: Engine
    method: PeftMethod | None
    global_batch: int  # examples (packed: rows) in an optimizer step of all processes
    stage: str = "train"  # of the method's
    say: Callable[[str], None] = print
    under_way: Save | None = field(default=None, init=False)
    copies: dict[Group, dict[str, Tensor]] = field(default_factory=dict, init=False)
    """What `async_save` writes from, on rank 0."""
    failure: str | None = field(default=None, init=False)
    """Of the last save, on all ranks."""
    shared: bool = field(default=False, init=False)
    """Whether all ranks were seen to share the directory."""

    def save(self, state: TrainState) -> None:
        """All ranks. Writes a checkpoint, points at the best one, removes old ones; with
        `async_save` all of that happens later, to the state as it is now."""
        self.finish()
        self._check_shared()
        rngs = distributed.gather_objects([snapshot.collect_rng()])
        tensors: dict[Group, dict[str, Tensor]] = {
            "trainable": self.engine.trained(),
            "optimizer": self.engine.optimizer_state(),
            "base": self._changed_base(),
        }
        scaler = self.engine.scaler
        progress = {
            "train": asdict(state),
            "stage": self.stage,
            "global_batch": self.global_batch,
            "scaler": scaler.state_dict() if scaler else None,
        }
        later = self.settings.async_save
        if distributed.is_main():
            if later and not self.engine.copies_state:
                tensors = self.copies = {
                    group: snapshot.copy_tensors(named, self.copies.get(group))
                    for group, named in tensors.items()
                }
            write = partial(self._write, state.step, tensors, progress, rngs, state.best_step)
            self.under_way = Save(state.step, write)
            if later:
                self.under_way.start()
            else:
                self.under_way.run()
        if not later:
            self.finish()

    def _write(
        self,
        step: int,
        tensors: Mapping[Group, Mapping[str, Tensor]],
        progress: Mapping[str, Any],
        rngs: list[dict[str, Any]],
        best: int | None,
    ) -> None:
        """Rank 0, also beside the training: it touches nothing that training changes."""
        checkpoint.save_checkpoint(self.run_dir, step, tensors, progress, rngs)
        # After a resume from before a damaged, better one, `best` is another one than it was.
        if best and checkpoint.checkpoint_path(self.run_dir, best).exists():
            checkpoint.write_pointer(self.run_dir, "best", best)
        best = checkpoint.read_pointer(self.run_dir, "best")
        limit = self.settings.save_total_limit
        try:
            checkpoint.prune(self.run_dir, limit, () if best is None else (best,))
        except OSError as error:  # what was saved counts
            self.say(f"warning: an old checkpoint cannot be removed: {error}; remove it by hand")

    def finish(self) -> None:
        """All ranks. Waits for the save under way. Where it failed, all ranks raise InputError, or
        rank 0 warns, as `save_errors` says."""
        self.wait()
        ended, self.under_way = self.under_way, None
        if ended:
            self.failure = ended.failure()
        # What rank 0 says holds: the others have no save of their own.
        [(new, self.failure), *_] = distributed.gather_objects([(ended is not None, self.failure)])
        if not (new and self.failure):
            return
        if self.settings.save_errors == "stop":
            self.check_saved()
        if distributed.is_main():
            self.say(f"warning: {self.failure}; training goes on, and the next save tries again")

    def wait(self) -> None:
        """Until nothing is being written on this rank."""
        if self.under_way and self.under_way.is_alive():
            self.under_way.join()

    def check_saved(self) -> None:
        """All ranks, after `finish`. Raises InputError where the last save failed."""
        if self.failure:
            raise InputError(
                f"{self.failure}; earlier checkpoints are untouched: make room, or make "
                f"{self.run_dir} writable, and go on with --resume"
            )

    def _check_shared(self) -> None:
        """All ranks, before the first save. Raises InputError where rank 0's directory is not the
        others'."""
        if self.shared:
            return
        directory = checkpoint.checkpoint_path(self.run_dir, 0).parent
        if distributed.is_main():
            with suppress(OSError):  # the save meets it again
                directory.mkdir(parents=True, exist_ok=True)
        [made, *_] = distributed.gather_objects([directory.is_dir()])
        seen = distributed.gather_objects([made and appears(directory)])
        if made and not all(seen):
            blind = [rank for rank, sees in enumerate(seen) if not sees]
            raise InputError(
                f"ranks {blind} of {len(seen)} do not see {directory}, which rank 0 has made; the "
                "run directory must be on a file system that all nodes share"
            )
        self.shared = True

    def _changed_base(self) -> dict[str, Tensor]:
        """All ranks. For rank 0, on the CPU, as an engine may take weights back. Where there is
        nothing, no weights are gathered."""
        if self.method is None or not self.method.changes_base:
            return {}
        with self.engine.for_writing() as model:
            if model is None or not distributed.is_main():
                return {}
            return {name: t.detach().cpu() for name, t in self.method.changed_base(model).items()}

    def restore(self, found: checkpoint.Checkpoint) -> TrainState:
        """All ranks. Parameters, optimizer and random states as they were."""
        assert found.state.get("stage", "train") == self.stage, (found.state, self.stage)
        self.engine.load_trained(found.tensors["trainable"])
        self.engine.load_optimizer_state(found.tensors["optimizer"])
        if self.engine.scaler:
            self.engine.scaler.load_state_dict(found.state["scaler"])
        if found.rng is not None:
            snapshot.restore_rng(found.rng)
        return TrainState(**found.state["train"])

    def go_back(self) -> TrainState | None:
        """All ranks. Everything as in the newest checkpoint; None where there is none."""
        self.finish()
        found, _ = find_resume_point(self.run_dir)
        return self.restore(found) if found else None

    def load_best(self, state: TrainState) -> bool:
        """All ranks. The weights of the best step; False where no checkpoint has kept them whole,
        which rank 0 says."""
        if state.best_step in (None, state.step):
            return True
        path = checkpoint.checkpoint_path(self.run_dir, state.best_step or 0)
        damage = checkpoint.find_damage(path) if distributed.is_main() else None
        [damage, *_] = distributed.gather_objects([damage])
        if damage:
            if distributed.is_main():
                self.say(
                    f"warning: the best weights, of step {state.best_step}, are lost ({damage}); "
                    f"those of step {state.step} are taken"
                )
            return False
        best = checkpoint.load_checkpoint(path, rank=distributed.rank(), verify=False)
        self.engine.load_trained(best.tensors["trainable"])
        return True


def find_resume_point(run_dir: Path) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """All ranks. The newest checkpoint that verifies, and lines that say what was skipped or not
    found. Rank 0 looks for it. Raises InputError where another rank cannot read it, or where none
    is whole and one cannot be read, which may pass."""
    found: list[tuple[Path | None, list[str]]] = []
    if distributed.is_main():
        found = [checkpoint.latest_checkpoint(run_dir)]
    [(path, skipped)] = distributed.gather_objects(found)
    unreadable = [line for line in skipped if checkpoint.UNREADABLE in line]
    if path is None and unreadable:
        raise InputError(
            f"checkpoint {run_dir.name}/{unreadable[0]}, and no other one is whole; make it "
            "readable and resume again, or remove it to start from step 0"
        )
    notes = [f"skipped a damaged checkpoint: {line}" for line in skipped]
    if path is None:
        none = "no checkpoint is whole" if skipped else "no checkpoint yet"
        return None, [*notes, f"{none}: starting from step 0"]
    if not appears(path / checkpoint.MANIFEST):
        raise InputError(
            f"rank {distributed.rank()} does not see {path}, from which rank 0 resumes; the run "
            "directory must be on a file system that all nodes share"
        )
    point = checkpoint.load_checkpoint(path, rank=distributed.rank(), verify=False)
    check_state(point.state, path)
    return point, [*notes, f"resuming from {path.name}"]


class SavedState(BaseModel):
    """What `RunCheckpoints.save` writes beside the tensors."""

    train: TrainState
    stage: Literal["warmup", "train"] = "train"
    global_batch: int = Field(ge=1)
    scaler: dict[str, Any] | None


def check_state(state: Mapping[str, Any], path: Path) -> None:
    """Raises InputError for a state that no run wrote."""
    try:
        SavedState.model_validate(state)
        TrainState(**state["train"])  # no more and no fewer keys
    except (ValidationError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"checkpoint {path}: its {checkpoint.STATE} is not what a run wrote ({reason}); resume "
            "from another one"
        ) from None
