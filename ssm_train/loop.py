"""The whole training algorithm on one page."""

from __future__ import annotations

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
    save_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints; None: as often as evaluations."""
    skip_eval: bool = False
    """Never evaluate."""
    no_save: bool = False
    """Never write checkpoints."""
    min_eval_metric_after_epoch: dict[int, float] = Field(default_factory=dict)
    """Epoch -> least value of the task's main metric; below it the run stops."""
