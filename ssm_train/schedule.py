"""How long a run is and what happens every so many steps: the loop's settings, as steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ssm_train.settings import Settings


class LoopSettings(Settings):
    """How long to train, and what happens every so many steps."""

    num_epochs: float = Field(default=10, gt=0)
    """Passes over the data; may be fractional."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; wins over `num_epochs`."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches in an optimizer step."""
    logging_steps: int | None = Field(default=None, ge=1)
    """Steps between log lines; None: min(50, steps in an epoch)."""
    eval_epochs: float = Field(default=1, gt=0)
    """Epochs between evaluations, and between checkpoints."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between evaluations; wins over `eval_epochs`."""
    eval_at_start: bool = False
    """Evaluate before the first step too."""
    save_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; None: as often as evaluations."""
    skip_eval: bool = False
    """Never evaluate."""
    no_save: bool = False
    """Never write checkpoints."""
    cuda_graphs: bool | None = None
    """Record forward and backward of packed rows as CUDA graphs, on one GPU or under DDP
    (of several hosts with adapters only); None: where it can be."""
    watchdog_seconds: float = Field(default=600.0, ge=0)
    """Without a step or an evaluated batch for so long, every process writes its stack and ends;
    0: never."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Steps in a row without an update, as the loss or a gradient was NaN or infinite, or with a
    loss of zero, that end the run."""
    spike_threshold: float = Field(default=20.0, ge=0)
    """A loss above the median of the last 64 steps by more than this many median deviations from it
    is logged as a spike; 0: never."""
    spike_rollbacks: int = Field(default=0, ge=0)
    """How often a run goes back to its newest checkpoint at a loss spike, to go on with the batches
    after it; 0: never."""
    oom: Literal["stop", "shrink"] = "stop"
    """Out of memory on a batch: stop; shrink: halve such batches, which leaves the gradient as it
    is (one process)."""
    min_eval_metric_after_epoch: dict[int, float] = Field(default_factory=dict)
    """Epoch -> least value of the task's main metric; below it the run stops."""


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps: how many, and every how many something happens."""

    total_steps: int
    decay_steps: int  # after which the learning rate ends: the run's, in a shorter stage too
    steps_per_epoch: int
    logging_steps: int
    eval_steps: int
    save_steps: int


def plan_schedule(settings: LoopSettings, steps_per_epoch: int) -> Schedule:
    """Turns epochs into optimizer steps; nothing is ever less than one step."""
    every_epochs = max(1, int(settings.eval_epochs * steps_per_epoch))
    eval_steps = settings.eval_steps or every_epochs
    total_steps = settings.max_steps or max(1, int(settings.num_epochs * steps_per_epoch))
    return Schedule(
        total_steps=total_steps,
        decay_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        logging_steps=settings.logging_steps or min(50, steps_per_epoch),
        eval_steps=eval_steps,
        save_steps=settings.save_steps or eval_steps,
    )
