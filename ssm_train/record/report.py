"""What many runs came to: a row a run, best first, as text, CSV and a picture. It reads the
records that the runs left behind; torch is not loaded."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from ssm_train.errors import InputError
from ssm_train.metrics import LOSSES, clock, read_metrics, short_number
from ssm_train.record import MARKER, RESULT, WARMUP
from ssm_train.strict_yaml import read_document

NO_RESULT = "running or stopped early"
SUFFIXES = (".txt", ".csv", ".png")
# Sizes in the picture, in inches.
BAR, TITLE, AXIS = 0.24, 0.5, 0.6  # heights
BARS, NUMBERS, LETTER = 5.5, 1.3, 0.072  # widths


class OtherRecord(InputError):
    """The directory's `cfg.yaml` was written by another program, such as mamba-peft."""


@dataclass(frozen=True)
class Row:
    """A run in the report; the fields are the columns of the CSV, None is an empty cell."""

    run_dir: str
    name: str
    data: str
    seed: int
    outcome: str
    steps: int
    main_metric: str | None = None
    best: float | None = None
    best_step: int | None = None
    test: float | None = None
    trainable: int | None = None
    parameters: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None

    @property
    def loss(self) -> float:
        """What sorts the best first."""
        assert self.best is not None
        return self.best if self.main_metric in LOSSES else -self.best

    @property
    def trainable_share(self) -> float | None:
        return self.trainable / self.parameters if self.trainable and self.parameters else None


def report_runs(run_dirs: Sequence[Path], out: Path | None = None) -> str:
    """The table of the runs, sorted by data, seed, and main metric with the best first; below it,
    what was left out as the record of another program.

    With `out` also writes `<out>.txt`, `<out>.csv` (full precision) and `<out>.png` (bars of the
    main metric). Raises InputError for no run, or a record that cannot be read.
    """
    if not run_dirs:
        raise InputError("no run to report; give directories of runs")
    rows: list[Row] = []
    others: list[OtherRecord] = []
    for directory in run_dirs:
        try:
            rows.append(read_run(directory))
        except OtherRecord as error:
            others.append(error)
    if not rows:
        raise others[0]
    rows.sort(key=place)
    text = "\n".join([format_table(rows), *(f"left out: {error}" for error in others)])
    if out is not None:
        if out.suffix in SUFFIXES:
            out = out.with_suffix("")
        txt, table, png = (out.with_name(out.name + suffix) for suffix in SUFFIXES)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            txt.write_text(f"{text}\n", encoding="utf-8")
            write_csv(rows, table)
            draw_bars(rows, png)
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None
    return text


def find_runs(directories: Sequence[Path]) -> list[Path]:
    """Directories of runs at and below the given ones, each once; what lies inside a run is its
    own. Raises InputError where there is none."""
    found: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            kind = "is a file" if directory.exists() else "does not exist"
            raise InputError(f"DIR {directory} {kind}; give a run or a directory above runs")
        for parent, inside, files in os.walk(directory):
            inside.sort()
            if MARKER in files:
                inside.clear()
                found.setdefault(Path(parent).resolve(), Path(parent))
    if not found:
        places = ", ".join(map(str, directories))
        raise InputError(f"no run in {places}: nothing there holds a {MARKER}; train first")
    return list(found.values())


def read_run(run_dir: Path) -> Row:
    """A run by its config and result, or its last step. Raises InputError for damaged files."""
    config = read_document(run_dir / MARKER).values
    for key in ("name", "data", "seed"):
        if key not in config:
            raise OtherRecord(f"{run_dir / MARKER} has no {key}: it is not the record of a run")
    data = Path(config["data"]).stem  # as in the directory's name
    which = (str(run_dir), str(config["name"]), data, int(config["seed"]))
    path = run_dir / RESULT
    if not path.is_file():
        log = run_dir / "metrics.jsonl"
        steps = [row["step"] for row in read_metrics(log)] if log.is_file() else []
        return Row(*which, NO_RESULT, max(steps, default=0))
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        metric = result["main_metric"]
        return Row(
            *which,
            result["outcome"] + (" in its warm-up" if result.get("stage") == WARMUP else ""),
            result["steps"],
            metric,
            result["metrics"].get(metric),
            result["best_step"],
            result["test"].get(metric),
            result["trainable"],
            result["parameters"],
            result["seconds"],
            result["tokens_per_second"],
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not the result of a run ({type(error).__name__}: {error}); finish the run "
            "again with --resume, or leave it out"
        ) from None


def place(row: Row) -> tuple[Any, ...]:
    """Where a row stands: runs without a value come after those with one."""
    group = (row.data, row.seed)
    if row.best is None:
        return (*group, True, row.outcome == NO_RESULT, row.name)
    return (*group, False, row.main_metric, row.loss, row.name)


# ---------------------------------------------------------------- text and CSV

# Header, text of a row, and whether it is aligned like a number.
COLUMNS: tuple[tuple[str, Callable[[Row], str], bool], ...] = (
    ("name", lambda row: shorten(row.name, 44), False),
    ("data", lambda row: shorten(row.data, 24), False),
    ("seed", lambda row: str(row.seed), True),
    ("metric", lambda row: shorten(row.main_metric or "-", 20), False),
    ("best", lambda row: cell(row.best, number), True),
    ("step", lambda row: cell(row.best_step, str), True),
    ("test", lambda row: cell(row.test, number), True),
    ("trainable", lambda row: cell(row.trainable_share, "{:.2%}".format), True),
    ("time", lambda row: cell(row.seconds, clock), True),
    ("tokens/s", lambda row: cell(row.tokens_per_second, short_number), True),
    ("outcome", lambda row: describe_outcome(row), False),
)


def format_table(rows: Sequence[Row]) -> str:
    """Aligned lines, an empty one between groups of data and seed; at most about 200 columns."""
    header = [name for name, _, _ in COLUMNS]
    lines = [[text(row) for _, text, _ in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def align(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, (_, _, right) in zip(cells, widths, COLUMNS, strict=True)
        ]
        return "  ".join(padded).rstrip()

    text = [align(header), align(["-" * width for width in widths])]
    for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
        if i and (row.data, row.seed) != (rows[i - 1].data, rows[i - 1].seed):
            text.append("")
        text.append(align(line))
    return "\n".join(text)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def shorten(text: str, width: int) -> str:
    """Both ends of a long text: names tend to differ in either."""
    kept = width - 1
    return text if len(text) <= width else f"{text[: kept - kept // 2]}…{text[-(kept // 2) :]}"


def cell(value: Any, text: Callable[[Any], str]) -> str:
    return "-" if value is None else text(value)


def number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def describe_outcome(row: Row) -> str:
    return row.outcome if row.outcome == "finished" else f"{row.outcome} (step {row.steps})"


# ---------------------------------------------------------------- the picture


def draw_bars(rows: Sequence[Row], path: Path) -> None:
    """Horizontal bars of the main metric, a panel for each data set, the best run on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted(
        (row for row in rows if row.best is not None),
        key=lambda row: (row.data, row.main_metric, row.loss, row.name),
    )
    panels = [list(group) for _, group in groupby(shown, lambda row: (row.data, row.main_metric))]
    left = 0.3 + LETTER * max((len(bar_label(row)) for row in shown), default=0)
    width = left + BARS + NUMBERS
    height = sum(TITLE + BAR * len(panel) + AXIS for panel in panels) or 1.0
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    seeds = sorted({row.seed for row in shown})
    colours = {seed: f"C{i % 10}" for i, seed in enumerate(seeds)}
    top = height
    for panel in panels:
        bars = BAR * len(panel)
        top -= TITLE + bars
        box = (left / width, top / height, BARS / width, bars / height)
        draw_panel(figure.add_axes(box), panel, colours)
        top -= AXIS
    if not panels:
        figure.text(0.5, 0.5, "no run has a result yet", ha="center", va="center")
    figure.savefig(path, dpi=min(130, 60_000 / height))  # a PNG ends at 65,535 pixels


def draw_panel(axes: Any, rows: Sequence[Row], colours: dict[int, str]) -> None:
    """One data set: bars, diamonds for the test split, and both as numbers on the right."""

    def write(points: float, y: float, text: str, colour: str = "dimgrey") -> None:
        at, away = (1, y), (points, 0)  # from the right end of the bars
        place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(text, at, away, **place, ha="right", va="center", fontsize=8, color=colour)

    write(40, -0.95, "best")
    for y, row in enumerate(rows):
        axes.barh(y, row.best, height=0.7, color=colours[row.seed], alpha=0.6)
        write(40, y, cell(row.best, number), "black")
    tested = [(y, row.test) for y, row in enumerate(rows) if row.test is not None]
    if tested:
        axes.plot([test for _, test in tested], [y for y, _ in tested], "kD", ms=3.5, label="test")
        write(80, -0.95, "test")
    for y, test in tested:
        write(80, y, number(test))
    seeds = sorted({row.seed for row in rows})
    for seed in seeds if len(seeds) > 1 else []:
        axes.barh(0, 0, color=colours[seed], alpha=0.6, label=f"seed {seed}")
    if tested or len(seeds) > 1:
        above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 6, "borderaxespad": 0.1}
        axes.legend(**above, frameon=False, fontsize=8, handlelength=1)
    label_axes(axes, rows)


def label_axes(axes: Any, rows: Sequence[Row]) -> None:
    metric = str(rows[0].main_metric)
    better = "lower" if metric in LOSSES else "higher"
    axes.set_title(rows[0].data, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(f"{metric.replace('_', ' ')} on validation ({better} is better)", fontsize=9)
    axes.set_yticks(range(len(rows)), [bar_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.axvline(0, color="black", lw=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def bar_label(row: Row) -> str:
    name = shorten(row.name, 44)
    return name if row.outcome == "finished" else f"{name} ({row.outcome})"
