"""What of a run is in its checkpoints, and how it is put back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ssm_train import checkpoint, distributed, snapshot
from ssm_train.adapters.base import PeftMethod
from ssm_train.engines.base import Engine
from ssm_train.loop import TrainState


@dataclass
class RunCheckpoints:
    """The checkpoints of one run: trained parameters, optimizer, random states, progress."""

    run_dir: Path
    keep: int
    engine: Engine
    method: PeftMethod | None
    global_batch: int  # examples (packed: rows) in an optimizer step of all processes
    stage: str = "train"  # of the method's

    def save(self, state: TrainState) -> None:
        """All ranks. Writes a checkpoint, points at the best one, removes old ones."""
        scaler = self.engine.scaler
        checkpoint.save_checkpoint(
            self.run_dir,
            state.step,
            {
                "trainable": self.engine.trained(),
                "optimizer": self.engine.optimizer_state(),
                "base": self._changed_base(),
            },
            {
                "train": asdict(state),
                "stage": self.stage,
                "global_batch": self.global_batch,
                "scaler": scaler.state_dict() if scaler else None,
            },
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            barrier=distributed.barrier,
        )
        if distributed.is_main():  # rank 0
            best_step = state.best_step  # also after a resume from before a damaged, better one
            if best_step and checkpoint.checkpoint_path(self.run_dir, best_step).exists():
                checkpoint.write_pointer(self.run_dir, "best", best_step)
            best = checkpoint.read_pointer(self.run_dir, "best")
            checkpoint.prune(self.run_dir, self.keep, () if best is None else (best,))
        distributed.barrier()

    def _changed_base(self) -> dict[str, Tensor]:
        """All ranks. On the CPU, as an engine may take weights back; full fine-tuning has none, and
        gathers none."""
        if self.method is None:
            return {}
        with self.engine.whole() as model:
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
        found, _ = find_resume_point(self.run_dir)
        return self.restore(found) if found else None

    def load_best(self, state: TrainState) -> bool:
        """All ranks. The weights of the best step; False where no checkpoint has kept them."""
        if state.best_step in (None, state.step):
            return True
        path = checkpoint.checkpoint_path(self.run_dir, state.best_step or 0)
        if not path.exists():
            return False
        best = checkpoint.load_checkpoint(path, rank=distributed.rank())
        self.engine.load_trained(best.tensors["trainable"])
        return True


def find_resume_point(run_dir: Path) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and lines that say what was skipped or not found."""
    path, skipped = checkpoint.latest_checkpoint(run_dir)
    notes = [f"skipped a damaged checkpoint: {line}" for line in skipped]
    if path is None:
        return None, [*notes, "no checkpoint yet: starting from step 0"]
    found = checkpoint.load_checkpoint(path, rank=distributed.rank(), verify=False)
    return found, [*notes, f"resuming from {path.name}"]
