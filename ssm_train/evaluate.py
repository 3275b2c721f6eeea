"""Loss and task metrics over all processes."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ssm_train.settings import Settings


class EvalSettings(Settings):
    """What evaluation measures."""

    eval_gen: dict[str, Any] | None = None
    """Generate when evaluating: {max_length, min_length, num_beams, ...} of `transformers`."""
    metric_for_best: str | None = None
    """Metric that chooses the best checkpoint; None: the task's main metric."""
    max_eval_examples: int | None = Field(default=None, ge=1)
    """Evaluate on at most this many examples."""
