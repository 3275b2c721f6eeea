"""A loss far above those of the steps before it: a rule that a few wild losses do not move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

WINDOW = 64  # losses that one is compared with
LEAST = 32  # and as many at least
SMALLEST = 0.01  # of the median: what a deviation counts as at least


def is_spike(loss: float, recent: Sequence[float], threshold: float) -> bool:
    """Whether it is above the median of the recent ones by more than `threshold` times their median
    absolute deviation from it; with `threshold` 0 never."""
    if not threshold or len(recent) < LEAST:
        return False
    middle = median(recent)
    deviation = median(abs(other - middle) for other in recent)
    return loss > middle + threshold * max(deviation, SMALLEST * middle)


def remember(loss: float, recent: list[float]) -> None:
    """Adds a loss to the recent ones, unless it is no number."""
    if math.isfinite(loss):
        recent.append(loss)
        del recent[:-WINDOW]


def describe(spikes: Sequence[tuple[float, int]], recent: Sequence[float]) -> str:
    """Of (loss, step) since the last line of the log."""
    loss, step = max(spikes)
    count = "a loss spike" if len(spikes) == 1 else f"{len(spikes)} loss spikes, the largest"
    return f"{count}: {loss:.4g} in step {step}, where {median(recent):.4g} is usual"
