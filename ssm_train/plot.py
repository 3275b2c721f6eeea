"""Curves of one run or several as one PNG, the loss and one panel per metric; and the dimensions
that a warm-up chose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssm_train.durable import writing
from ssm_train.errors import InputError
from ssm_train.metrics import read_metrics

if TYPE_CHECKING:
    from ssm_train.peft.dimensions import Selection

NOT_METRICS = {
    *("split", "step", "epoch", "loss", "perplexity", "tokens", "seconds", "examples"),
    *("grad_norm", "learning_rate", "tokens_per_second", "memory_gib", "skipped_steps"),
}
MAX_PANELS = 8
PERCENT = ("bleu", "meteor", "chrf")  # sacrebleu counts from 0 to 100


def plot_metrics(run_dirs: Sequence[str | Path], out_png: str | Path) -> Path:
    """Draws `metrics.jsonl` of every run directory; returns `out_png`.

    Training loss as a line, validation as dots on a line, the runs in their own colours.
    Raises InputError for a directory without metrics.
    """
    runs = {_label(d, run_dirs): read_metrics(Path(d) / "metrics.jsonl") for d in run_dirs}
    if not any(runs.values()):
        raise InputError(f"no metrics yet in {', '.join(map(str, run_dirs))}; train first")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = _metric_names(runs)
    columns = min(3, 1 + len(names))
    lines = -(-(1 + len(names)) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    _draw_loss(next(panels), runs)
    for name in names:
        _draw_metric(next(panels), runs, name)
    for unused in panels:
        unused.set_axis_off()
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with writing(out_png):
        figure.savefig(out_png, dpi=130)
    return out_png


def plot_selection(selection: Selection, out_png: str | Path) -> Path:
    """Draws the dimensions that a warm-up chose, layers x channels: how far each channel moved,
    relative to its layer's farthest, and whether it trains, is frozen or is zeroed."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    choices = list(selection.layers.values())
    score = np.stack([c.score.cpu().double().sqrt().numpy() for c in choices])  # [layers, d]
    fate = np.zeros(score.shape)
    for row, choice in zip(fate, choices, strict=True):
        row[choice.channels.cpu().numpy()] = 1
        row[choice.zeroed.cpu().numpy()] = -1
    width = max(10, score.shape[1] / 100)  # inches of 130 dots: at least one for each channel
    figure = Figure(figsize=(width, 2.4 + 0.14 * len(choices)), layout="constrained")
    FigureCanvasAgg(figure)
    moved, chosen = figure.subplots(2, 1, sharex=True)
    options: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
    image = moved.imshow(score / score.max(1, keepdims=True), vmin=0, vmax=1, **options)
    figure.colorbar(image, ax=moved, label="moved")
    colours = ListedColormap(["#1f1f1f", "#d9d9d9", "#d95f02"])
    image = chosen.imshow(fate, vmin=-1.5, vmax=1.5, cmap=colours, **options)
    bar = figure.colorbar(image, ax=chosen, ticks=[-1, 0, 1])
    bar.set_ticklabels(["zeroed", "frozen", "trained"])
    for panel in (moved, chosen):
        panel.set_ylabel("layer")
    chosen.set_xlabel("channel")
    with writing(Path(out_png)):
        figure.savefig(out_png, dpi=130)
    return Path(out_png)


Runs = dict[str, list[dict[str, Any]]]


def _label(run_dir: str | Path, run_dirs: Sequence[str | Path]) -> str:
    """A run's name, with its parent where two runs share the name."""
    path = Path(run_dir).resolve()
    twins = sum(Path(other).resolve().name == path.name for other in run_dirs)
    return path.name if twins == 1 else f"{path.parent.name}/{path.name}"


def _metric_names(runs: Runs) -> list[str]:
    """Metrics of evaluation rows, in the order in which they first appear."""
    names: dict[str, None] = {}
    for rows in runs.values():
        for row in rows:
            if row.get("split") != "train":
                names.update(
                    {k: None for k, v in row.items() if isinstance(v, float) and _is_metric(k)}
                )
    return list(names)[:MAX_PANELS]


def _is_metric(key: str) -> bool:
    return key not in NOT_METRICS


def _points(rows: list[dict[str, Any]], split: str, key: str) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[key]) for r in rows if r.get("split") == split and _number(r.get(key))]
    return [step for step, _ in found], [value for _, value in found]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _draw_loss(axes: Any, runs: Runs) -> None:
    for i, (label, rows) in enumerate(runs.items()):
        colour = f"C{i % 10}"
        several = f"{label} " if len(runs) > 1 else ""
        axes.plot(*_points(rows, "train", "loss"), color=colour, lw=1.3, label=f"{several}train")
        steps, losses = _points(rows, "val", "loss")
        if steps:
            axes.plot(steps, losses, "o--", color=colour, ms=4, lw=1, label=f"{several}validation")
    values = [y for line in axes.lines for y in line.get_ydata() if y > 0]
    if values and max(values) > 30 * min(values):  # else one high point flattens all others
        axes.set_yscale("log")
    _label_axes(axes, "Loss", "cross entropy (nats per token)")


def _draw_metric(axes: Any, runs: Runs, name: str) -> None:
    for i, (label, rows) in enumerate(runs.items()):
        for split, style in (("val", "o-"), ("test", "*")):
            steps, values = _points(rows, split, name)
            if steps:
                shown = {"val": "validation", "test": "test"}[split]
                several = f"{label} " if len(runs) > 1 else ""
                axes.plot(steps, values, style, color=f"C{i % 10}", ms=5, label=f"{several}{shown}")
    percent = name.lower().startswith(PERCENT)
    title = name.replace("_", " ")
    _label_axes(
        axes, title[:1].upper() + title[1:], f"{title} (0 to 100)" if percent else f"{title}"
    )


def _label_axes(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
