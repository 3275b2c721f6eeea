"""What an evaluation decides in the loop: the best step so far, and whether the run goes on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from ssm_train.stop_flag import Interrupted

if TYPE_CHECKING:
    from ssm_train.loop import Training, TrainState


class Evaluated(NamedTuple):
    best: bool
    too_low: bool


def evaluate(run: Training, state: TrainState, stop: bool = False) -> Evaluated:
    """All ranks. Takes the metrics of the step, or leaves it `unevaluated` where all are to stop,
    or one does meanwhile: the run takes them when it goes on."""
    assert run.evaluate is not None
    state.unevaluated = True
    if stop:
        return Evaluated(False, False)
    run.drop_graphs()  # the evaluation needs memory too
    try:
        metrics = run.evaluate(state.step)
    except Interrupted:
        return Evaluated(False, False)
    state.unevaluated = False
    best = note_best(run, state, metrics)
    return Evaluated(best, below_least_metric(run, state.step, metrics[run.main_metric]))


def note_best(run: Training, state: TrainState, metrics: dict[str, float]) -> bool:
    """Remembers the metrics with the best main one; True when these are they."""
    sign = 1 if run.higher_is_better else -1
    value, best = metrics[run.main_metric], state.best.get(run.main_metric)
    if math.isnan(value) or (best is not None and sign * value <= sign * best):
        return False
    state.best, state.best_step = metrics, state.step
    return True


def below_least_metric(run: Training, step: int, metric: float) -> bool:
    """Whether the main metric misses the least value asked for from this epoch on."""
    epochs = step / run.schedule.steps_per_epoch
    return any(epochs >= epoch and metric < least for epoch, least in run.least_metric.items())
