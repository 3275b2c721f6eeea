"""What is measured and where it goes: tokens/s, memory, metrics.jsonl, progress bar."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import Field

from ssm_train.durable import write_atomically, writing
from ssm_train.errors import InputError
from ssm_train.settings import Settings

LOSSES = ("loss", "perplexity")
"""Metrics of which less is better."""

Row = Mapping[str, Any]


class MetricsSettings(Settings):
    """Where metrics go besides `metrics.jsonl` and the terminal."""

    trackers: list[str] = Field(default_factory=list)
    """Of tensorboard, wandb, trackio, swanlab."""


class TokenRate:
    """The one definition of tokens/s: real tokens (no padding) of all processes per second of
    wall time, evaluation and saving left out."""

    def __init__(self, tokens: int = 0) -> None:
        """`tokens`: seen before this process began, after a resume."""
        self.tokens = tokens

    def read(self, tokens: int, seconds: float) -> float:
        """Rate since the last reading, from the total of tokens and the seconds since then."""
        new, self.tokens = tokens - self.tokens, tokens
        return new / seconds if seconds > 0 else 0.0


def peak_memory_gib() -> float:
    """Most memory held so far, GiB: tensors on the GPU, or the resident process on a CPU."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsLog:
    """Appends rows to `metrics.jsonl`, one JSON object a line, each flushed; rank 0 only.

    A row has `split` (train, val, test), `step` and numbers; what is not finite becomes null.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Starts an empty file; with `resume_step` keeps the rows up to that step, but for the
        test split, which every end of a run measures anew."""
        self.path = path
        self.kept: list[dict[str, Any]] = []
        if resume_step is not None and path.exists():
            rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
            self.kept = [row for row in rows if row.get("split") != "test"]
        write_atomically(path, "".join(_line(row) for row in self.kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, split: str, row: Row) -> None:
        assert "step" in row, row
        with writing(self.path):
            self._file.write(_line({"split": split, **row}))
            self._file.flush()

    def close(self) -> None:
        with writing(self.path):  # it tries again to write what could not be written
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _line(row: Row) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`. A torn last line (the process was killed) is left out; any other
    line that is not a row raises InputError."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the directory of a run")
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    torn = lines.pop()  # "" after a complete line
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not a metrics row: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise InputError(f"{path}:{number}: not a metrics row: no step")
        rows.append(row)
    if torn:
        try:
            row = json.loads(torn)
        except ValueError:
            return rows
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class Progress:
    """One bar on a terminal, plain lines elsewhere, nothing on ranks other than 0."""

    def __init__(self, total_steps: int, step: int = 0, main: bool = True) -> None:
        """`step`: optimizer steps already done; `main`: this process prints."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self.total_steps = total_steps
        self.main = main
        self.console = Console(highlight=False, quiet=not main, soft_wrap=True)
        self._bar = Bar(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            disable=not main or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=step, line="")
        self._last_step = step

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, row: Row) -> None:
        """A training row: step, loss, learning_rate, tokens_per_second, memory_gib, seconds."""
        step = int(row["step"])
        seconds_a_step = row["seconds"] / max(1, step - self._last_step)
        left = clock((self.total_steps - step) * seconds_a_step)
        self._last_step = step
        line = (
            f"loss {row['loss']:.4f}  lr {row['learning_rate']:.1e}  "
            f"{short_number(row['tokens_per_second'])} tokens/s  "
            f"{row['memory_gib']:.1f} GiB  {left} left"
        )
        self._bar.update(self._task, completed=step, line=line)
        if self._bar.disable:
            self.say(f"step {step}/{self.total_steps}  {line}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(text, markup=False)


@contextmanager
def count_records(what: str, main: bool = True) -> Iterator[Callable[[int], None]]:
    """A function that shows how many records are done, on a terminal and after a second only."""
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Bar(*columns, transient=True, disable=not main or not sys.stdout.isatty())
    task = bar.add_task(what)
    begun = time.monotonic()

    def show(done: int) -> None:
        if not bar.live.is_started and time.monotonic() > begun + 1:
            bar.start()
        bar.update(task, description=f"{what}: {done:,} records")

    try:
        yield show
    finally:
        bar.stop()


def clock(seconds: float) -> str:
    """`4:05`, or `1:04:05` from an hour on."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def short_number(value: float) -> str:
    """`812`, `12.3k`, `4.56M`: three digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
