"""Command lines as users of mamba-peft write them: how one ends, and what its run leaves behind."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_runs import LORA, losses, metrics

LR, STEPS = 1e-2, 6  # 24 examples, 4 a step
PLAIN: dict[str, Any] = {
    "peft": LORA | {"lora_dropout": 0.0},
    "max_steps": None,
    "num_epochs": 1,
    "eval_steps": None,
    "save_steps": None,
    "learning_rate": LR,
}


@dataclass(frozen=True)
class Command:
    """How a command line ended."""

    code: int
    out: str
    error: str


@dataclass(frozen=True)
class Seen:
    """What a run said and left behind."""

    said: str

    @property
    def run_dir(self) -> Path:
        return Path(self.said.partition("run ")[2].partition("\n")[0])

    @property
    def losses(self) -> list[float]:
        return losses(self.run_dir)

    def column(self, key: str, split: str = "train") -> list[Any]:
        return [row[key] for row in metrics(self.run_dir, split)]

    @property
    def saved(self) -> list[int]:
        return sorted(int(p.name[5:]) for p in (self.run_dir / "checkpoints").glob("step-????????"))

    def file(self, name: str) -> Any:
        return json.loads((self.run_dir / name).read_text(encoding="utf-8"))
