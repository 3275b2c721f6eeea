"""Jobs, their results in one JSON file, and the sweep: what every part builds its plan of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from ssm_train.durable import write_atomically
from ssm_train.errors import InputError
from ssm_train.record.environment import describe_environment

Job = dict[str, Any]
"""All that tells one training from another, as JSON: its part, family, method, seed, sizes."""
Found = dict[str, Any]
"""What a job measured, as JSON."""

SWEPT_FACTOR = 2.0
MOST_RATES = 9


@dataclass(frozen=True)
class Options:
    """What the command line says of all parts."""

    seeds: int
    quick: bool
    families: tuple[str, ...]
    data: dict[str, Path]  # name of a data set -> its directory
    work: Path  # holds base models, and the files that are written for a job
    device: str
    kernels: str


class Part(Protocol):
    """One question and its answer; the modules of this package are such parts."""

    TITLE: str

    def next_jobs(self, done: Results, options: Options) -> list[Job]:
        """The jobs that may run now; those that are done may be among them. None left: the end."""
        ...

    def run(self, job: Job, options: Options) -> Found: ...

    def describe(self, done: Results, options: Options) -> str:
        """Markdown: the tables of what is done."""
        ...

    def draw(self, axes: Any, done: Results, options: Options) -> None: ...


@dataclass
class Results:
    """Every finished job with what it found; `path` is written anew after each."""

    path: Path
    machines: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, tuple[Job, Found]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """The results of earlier calls, none where there is no file."""
        if not path.exists():
            return cls(path)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            rows = {key_of(row["job"]): (row["job"], row["found"]) for row in kept["results"]}
            return cls(path, kept["machines"], rows)
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"--out {path} holds no results of this command; give another file"
            ) from None

    def __contains__(self, job: Job) -> bool:
        return key_of(job) in self.rows

    def __getitem__(self, job: Job) -> Found:
        return self.rows[key_of(job)][1]

    def __iter__(self) -> Iterator[tuple[Job, Found]]:
        return iter(self.rows.values())

    def forget_bases(self, options: Options) -> None:
        """Base models that are not kept here are to be made again."""
        for job, _ in list(self):
            if job["kind"] == "base" and not base_directory(job, options).exists():
                del self.rows[key_of(job)]

    def add(self, job: Job, found: Found) -> None:
        environment = describe_environment()
        gpus = environment["gpus"]
        machine = f"{environment['cpus']} CPU cores" + (
            f", {', '.join(map(str, gpus))}" if gpus else ""
        )
        self.machines[machine] = environment
        self.rows[key_of(job)] = job, {**found, "machine": machine}
        rows = [{"job": job, "found": found} for job, found in self]
        text = json.dumps({"machines": self.machines, "results": rows}, indent=1)
        write_atomically(self.path, text + "\n")


def key_of(job: Job) -> str:
    return json.dumps(job, sort_keys=True)


def name_of(job: Job) -> str:
    """For files and messages: `b-tuning-gla-LoRA-0.001-0-500-10-4`."""
    return "-".join(str(value) for value in job.values())


def base_directory(job: Job, options: Options) -> Path:
    """Where the base model that this job trains is kept."""
    return options.work / name_of(job)


def sweep(
    done: Results,
    job_at: Callable[[float], Job],
    rates: Sequence[float],
    cost: Callable[[Found], Any],
) -> tuple[list[Job], float | None]:
    """The learning rate with the least cost, or the jobs that are missing to know it.

    Where the best rate is the lowest or the highest one, the next one beyond is tried too, so
    that no method is held back by the grid.
    """
    tried = sorted(rates)
    while True:
        missing = [job for job in map(job_at, tried) if job not in done]
        if missing:
            return missing, None
        best = min(tried, key=lambda rate: cost(done[job_at(rate)]))
        if len(rates) == 1 or len(tried) >= MOST_RATES or best not in (tried[0], tried[-1]):
            return [], best
        lower = best == tried[0]
        tried = [best / SWEPT_FACTOR, *tried] if lower else [*tried, best * SWEPT_FACTOR]


def spread(values: Sequence[float]) -> str:
    """`median (least to most)`, or the one value."""
    middle = number(median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({number(min(values))} to {number(max(values))})"


def number(value: float) -> str:
    """Three digits; what never came to an end is infinite."""
    return f"{value:.3g}" if math.isfinite(value) else "never"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def finite(value: Any) -> float:
    """A number of a JSON file; what is missing there was not finite."""
    return math.inf if value is None or not math.isfinite(value) else float(value)
