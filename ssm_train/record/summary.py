"""What a person takes away from a run: the exported weights, a plot, half a page of numbers, and
the same numbers as `result.json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from ssm_train.adapters.base import PeftMethod, Prepared
from ssm_train.adapters.loading import save_model
from ssm_train.durable import replace_directory, write_atomically
from ssm_train.evaluate import Row
from ssm_train.loop import Outcome
from ssm_train.record import RESULT, WARMUP
from ssm_train.record.plot import plot_metrics


@dataclass
class Result:
    """How a run ended, and where it left things."""

    outcome: Outcome
    run_dir: Path
    steps: int
    main_metric: str
    before: dict[str, float]  # metrics before the first step, with eval_at_start
    after: dict[str, float]  # metrics of the exported weights
    best_step: int | None  # the step they are from: the best one that a checkpoint kept
    trainable: int  # parameters
    parameters: int  # all of them, the adapter's included
    seconds: float  # of training with its evaluations, by this process
    test: dict[str, float] = field(default_factory=dict)  # of the exported weights
    rates: list[float] = field(default_factory=list)  # tokens/s of the log intervals
    rows: list[Row] = field(default_factory=list)  # predictions, on test where there is one
    exported: Path | None = None
    stage: str = "train"  # the one that it ended in
    skipped_steps: int = 0  # without an update, as the loss or a gradient was not finite
    trouble: str = ""  # where it was not finite, after too many of them

    @property
    def extent(self) -> str:
        """How far it went, in words."""
        return f"{self.steps} steps" + (" of the warm-up" if self.stage == WARMUP else "")

    @property
    def tokens_per_second(self) -> float | None:
        """The median, so that a first slow interval does not count."""
        return median(self.rates) if self.rates else None


def export_weights(
    run_dir: Path,
    prepared: Prepared,
    method: PeftMethod | None,
    *,
    base_id: str | None,
    revision: str | None = None,
) -> Path:
    """Rank 0. Writes `adapter/` (PEFT's format) or, after full fine-tuning, `model/`
    (transformers' format), with the tokenizer; returns the directory."""
    path = run_dir / ("model" if method is None else "adapter")
    with replace_directory(path) as directory:
        if method is None:
            save_model(prepared.model, directory)
        else:
            from ssm_train.peft.export import export_adapter

            assert base_id is not None, "an adapter belongs to weights that exist as files"
            if Path(base_id).exists():
                base_id = str(Path(base_id).resolve())  # right from any working directory
            export_adapter(
                prepared.model,
                directory,
                base_id=base_id,
                revision=revision,
                traits=prepared.traits,
                initial=getattr(method, "initial", None),
            )
        prepared.tokenizer.save_pretrained(directory)
    return path


def write_result(result: Result) -> None:
    """Rank 0. Writes `result.json`; what is not finite becomes null."""
    values = {
        "outcome": result.outcome,
        "stage": result.stage,
        "steps": result.steps,
        "skipped_steps": result.skipped_steps,
        "main_metric": result.main_metric,
        "best_step": result.best_step,
        "metrics": result.after,
        "before": result.before,
        "test": result.test,
        "trainable": result.trainable,
        "parameters": result.parameters,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
    }
    finite = json.loads(json.dumps(values), parse_constant=lambda _: None)
    write_atomically(result.run_dir / RESULT, json.dumps(finite, indent=2) + "\n")


def print_summary(result: Result, say: Callable[[str], None]) -> None:
    """Rank 0. The run in about fifteen lines; draws `metrics.png`."""
    run_dir, name = result.run_dir, result.main_metric
    stage_dir = run_dir / WARMUP if result.stage == WARMUP else run_dir
    last = stage_dir / "checkpoints" / "last"
    kept = f"; {last.read_text().strip()} is kept" if last.is_file() else ""
    endings = {
        "finished": f"finished after {result.extent}",
        "stopped": f"stopped and saved after {result.extent}; go on with --resume"
        if last.is_file()
        else f"stopped after {result.extent}; nothing was saved (no_save)"
        if result.steps
        else "stopped before the first step; go on with --resume",
        "bad_loss": f"ended after {result.extent}, the last of them bad (max_bad_steps): "
        f"{result.trouble}; lower learning_rate or choose prec: fp32{kept}",
        "low_metric": f"ended after {result.extent}: {name} is below min_eval_metric_after_epoch",
    }
    rows = [("outcome", endings[result.outcome])]
    if result.skipped_steps:
        rows.append(("skipped steps", f"{result.skipped_steps}, with NaN or infinity"))
    if result.before:
        rows.append((f"{name} before", f"{result.before[name]:.4g}"))
    if result.after:
        rows.append((f"{name} after", f"{result.after[name]:.4g} (step {result.best_step})"))
    tested = {name: result.test[name]} if name in result.test else result.test  # another task
    rows += [(f"{metric} on test", f"{value:.4g}") for metric, value in tested.items()]
    share = f"({result.trainable / result.parameters:.2%})"
    rows.append(("trainable", f"{result.trainable:,} of {result.parameters:,} parameters {share}"))
    if (rate := result.tokens_per_second) is not None:
        rows.append(("tokens/s", f"{rate:,.0f} (median, no padding counted)"))
    if result.rows:
        row = result.rows[0]
        rows += [
            ("example", row.input.strip()),
            ("  predicted", row.prediction.strip()),
            ("  expected", row.labels[0].strip()),
        ]
    if (stage_dir / "metrics.jsonl").stat().st_size:
        rows.append(("plot", str(plot_metrics([stage_dir], stage_dir / "metrics.png"))))
    if (run_dir / "selection.png").is_file():
        rows.append(("dimensions", f"{run_dir}/selection.png, selection.json"))
    log = "metrics.jsonl" if stage_dir == run_dir else f"{WARMUP}/metrics.jsonl"
    rows.append(("record", f"{run_dir}/cfg.yaml, environment.json, {log}, {RESULT}"))
    if result.exported:
        rows += [
            (result.exported.name, str(result.exported)),
            ("load it", f'ssm-train generate {run_dir} --prompt "..."'),
            ("", f'or in Python: model, tokenizer = ssm_train.load_run("{run_dir}")'),
        ]
    width = max(len(label) for label, _ in rows)
    say("")
    for label, text in rows:
        say(f"{label:<{width}}  {text}")
