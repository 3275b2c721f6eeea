"""What a run says while it trains: one row a log step, to the file, the trackers and the bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssm_train import distributed
from ssm_train.adapters.base import Batch
from ssm_train.evaluate import Row, write_predictions
from ssm_train.metrics import MetricsLog, Progress, TokenRate, peak_memory_gib
from ssm_train.trackers import Trackers

Observer = Callable[[Path, Mapping[str, Any]], None]
"""(directory of the stage, training row)."""
BatchObserver = Callable[[list[Batch]], None]

_observers: list[Observer] = []
_batch_observers: list[BatchObserver] = []


@contextmanager
def observed(by: Observer, batches: BatchObserver | None = None) -> Iterator[None]:
    """Inside, every training row is shown to `by`, on rank 0, once it is written; and this rank's
    batches of every step to `batches`, before it."""
    seen = [] if batches is None else [batches]
    _observers.append(by)
    _batch_observers.extend(seen)
    try:
        yield
    finally:
        _observers.remove(by)
        for observer in seen:
            _batch_observers.remove(observer)


def show_batches(batches: list[Batch]) -> None:
    for look in _batch_observers:
        look(batches)


class RunLog:
    """Rank 0 writes; on other ranks every method does nothing."""

    def __init__(
        self,
        run_dir: Path,
        bar: Progress,
        *,
        name: str,
        trackers: list[str],
        config: Mapping[str, Any],
        step: int,
        tokens: int,
    ) -> None:
        """`name`: of the run, for trackers. `step` and `tokens`: where a resumed run goes on, else
        0."""
        self.run_dir, self.bar = run_dir, bar
        self.rate = TokenRate(tokens)
        self.rates: list[float] = []  # tokens/s of every log interval
        self.rows: dict[str, list[Row]] = {}  # split -> what was predicted last
        self.values: dict[str, dict[str, float]] = {}  # split -> its last metrics
        self.before: dict[str, float] = {}  # metrics before the first step, when they were taken
        self.main = distributed.is_main()
        if self.main:
            self.file = MetricsLog(run_dir / "metrics.jsonl", resume_step=step or None)
            for row in self.file.kept:
                if row["step"] == 0:
                    self.before = read_values(row)
            self.trackers = Trackers(trackers, run_dir, name, config, bar.say, step)

    def trained(self, row: dict[str, float]) -> None:
        """A row of the loop."""
        if not self.main:
            return
        rate = self.rate.read(int(row["tokens"]), row["seconds"])
        self.rates.append(rate)
        row = {**row, "tokens_per_second": rate, "memory_gib": peak_memory_gib()}
        self._write("train", row)
        self.bar.update(row)
        for look in _observers:
            look(self.run_dir, row)

    def evaluated(
        self, step: int, split: str, values: Mapping[str, float], rows: list[Row]
    ) -> None:
        """Metrics of a split, and its predictions."""
        self.rows[split], self.values[split] = rows, dict(values)
        if step == 0:
            self.before = dict(values)
        if not self.main:
            return
        self._write(split, {"step": step, **values})
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k != "tokens")
        self.bar.say(f"step {step}  {split}  {shown}")
        if rows:
            write_predictions(self.run_dir, split, step, rows)

    def go_back(self, step: int, tokens: int) -> None:
        """The run stands at an earlier step again: later rows go."""
        self.rate = TokenRate(tokens)
        if self.main:
            self.file.close()
            self.file = MetricsLog(self.run_dir / "metrics.jsonl", resume_step=step)

    def close(self) -> None:
        if self.main:
            self.file.close()
            self.trackers.finish()

    def _write(self, split: str, row: Mapping[str, Any]) -> None:
        self.file.write(split, row)
        self.trackers.write(split, row)


def read_values(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in a row of `metrics.jsonl`, where null stands for what is not finite."""
    values = {key: value for key, value in row.items() if key not in ("split", "step")}
    return {key: math.nan if value is None else value for key, value in values.items()}
