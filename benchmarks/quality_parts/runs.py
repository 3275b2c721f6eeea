"""One training through `ssm_train.train.run`, and base models that are made once and kept."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from quality_parts.jobs import Found, Job, Options, base_directory
from ssm_train.config import resolve_config
from ssm_train.metrics import peak_memory_gib, read_metrics
from ssm_train.record.summary import Result
from ssm_train.strict_yaml import Document
from ssm_train.train import run

LORA_TARGETS = {
    "gla": ["q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mamba": ["in_proj", "x_proj", "out_proj"],
}
"""The projections whose rank may be 8 and more: dt_proj and gk_proj are too small for 2r = 16."""


@dataclass(frozen=True)
class Trained:
    """How a run ended, and its metrics.jsonl."""

    result: Result
    rows: list[dict[str, Any]]

    def curve(self, split: str, key: str) -> list[tuple[int, float | None]]:
        """(step, value) of every row of a split; None for what was not finite."""
        return [(row["step"], row[key]) for row in self.rows if row["split"] == split]

    def costs(self) -> Found:
        return {
            "outcome": self.result.outcome,
            "trainable": self.result.trainable,
            "parameters": self.result.parameters,
            "seconds": self.result.seconds,
            "tokens_per_second": self.result.tokens_per_second,
            "memory_gib": peak_memory_gib(),
        }


def train_base(job: Job, options: Options, **settings: Any) -> Found:
    """Trains a model from nothing and keeps it in `base_directory`."""
    kept = base_directory(job, options)
    with TemporaryDirectory(dir=options.work) as directory:
        trained = train(options, directory, seed=job["seed"], **settings)
        if kept.exists():  # of an earlier call whose results were lost
            shutil.rmtree(kept)
        (trained.result.run_dir / "model").rename(kept)
    return {**trained.costs(), "loss": trained.result.after.get("loss")}


def fine_tune(base: Job, job: Job, options: Options, **settings: Any) -> Trained:
    """Trains the model of job `base` further; nothing that it writes is kept."""
    with TemporaryDirectory(dir=options.work) as directory:
        model = str(base_directory(base, options))
        return train(options, directory, model=model, seed=job["seed"], **settings)


def train(options: Options, output_root: str, **settings: Any) -> Trained:
    values = {
        "name": "run",
        "device": options.device,
        "kernels": options.kernels,
        "prec": "fp32",
        "no_save": True,
        "num_data_workers": 0,
        "cache_dir": str(options.work / "tokens"),
        "output_root": output_root,
    }
    cfg, provenance = resolve_config(Document("benchmarks", values | settings, {}), "run")
    result = run(cfg, provenance, "run")
    return Trained(result, read_metrics(result.run_dir / "metrics.jsonl"))
