"""Services that show metrics, beside `metrics.jsonl`: they may fail, and training goes on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from ssm_train.durable import write_atomically
from ssm_train.errors import InputError

TRACKERS = ("tensorboard", "wandb", "trackio", "swanlab")
"""Trackers that `trackers:` may name; each is a package of the same name."""

TRACKER_ID = "tracker_id"  # in a run's directory
TRACKER_ID_LENGTH = 21  # older versions of swanlab take no other

Row = Mapping[str, Any]


def check_trackers(names: Iterable[str]) -> None:
    """Raises InputError with the install line for a tracker that is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"trackers: {', '.join(missing)} not installed; pip install {' '.join(missing)}"
        )


def tracker_id(run_dir: Path) -> str:
    """Under which trackers know a run: made when it begins, and the same whenever it goes on."""
    path = run_dir / TRACKER_ID
    if not path.is_file():
        write_atomically(path, uuid4().hex[:TRACKER_ID_LENGTH] + "\n")
    return path.read_text(encoding="utf-8", errors="replace").strip()


class Trackers:
    """Accelerate's trackers, fed with the rows of `metrics.jsonl`; rank 0 only. One that fails gets
    nothing more, and a line says so: training goes on, and `metrics.jsonl` has all rows."""

    def __init__(
        self,
        names: Sequence[str],
        run_dir: Path,
        run_name: str,
        config: Mapping[str, Any],
        say: Callable[[str], None] = print,
        step: int = 0,
    ) -> None:
        """Starts them. TensorBoard and wandb write below `run_dir`. A run that goes on, from
        `step`, does so in the tracker's run that it began."""
        check_trackers(names)
        self.say = say
        self.trackers: dict[str, Any] = {}
        if not names:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        run_id = tracker_id(run_dir)
        same = {"run_name": "ssm_train", "id": run_id, "resume": "allow"}
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {
                "run_name": run_name, "logging_dir": run_dir / "tensorboard",
                "purge_step": step + 1 if step else None,  # rows after the checkpoint come again
            },
            "wandb": same | {"name": run_name, "dir": str(run_dir)},
            "swanlab": same | {"experiment_name": run_name},
            # It knows a run by its name.
            "trackio": {
                "run_name": "ssm_train", "name": f"{run_name}-{run_id[:6]}", "resume": "allow"
            },
        }  # fmt: skip
        flat = {k: v if isinstance(v, int | float) else str(v) for k, v in config.items()}
        for name in names:
            with self._unless_it_fails(name):
                tracker = self.trackers[name] = LOGGER_TYPE_TO_CLASS[name](**options[name])
                tracker.start()
                tracker.store_init_configuration(flat)

    def write(self, split: str, row: Row) -> None:
        """Values named `train/loss`, `val/accuracy`, ... at the row's step."""
        step = int(row["step"])
        values = {
            f"{split}/{key}": float(value)
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float)
        }
        for name, tracker in list(self.trackers.items()):
            with self._unless_it_fails(name):
                tracker.log(values, step=step)

    def finish(self) -> None:
        for name, tracker in list(self.trackers.items()):
            with self._unless_it_fails(name):
                tracker.finish()

    @contextmanager
    def _unless_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a service that is down, a disk that is full, ...
            self.trackers.pop(name, None)
            reason = str(error).partition("\n")[0]
            self.say(
                f"warning: tracker {name} failed ({type(error).__name__}: {reason}) and gets "
                "nothing more; metrics.jsonl has all rows"
            )
