"""How long a save holds training up, in place and beside the training.

    python benchmarks/save_cost.py --megabytes 600 --turns 5 --out save_cost.json

Parameters and AdamW's moments of so many megabytes, on the CPU. While a save is written, a product
of matrices stands for a training step, which shows what writing takes from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from ssm_train import distributed
from ssm_train.checkpoint import CheckpointSettings
from ssm_train.durable import write_atomically
from ssm_train.engines.replicated import Replicated
from ssm_train.loop import TrainState
from ssm_train.record.environment import describe_environment
from ssm_train.resume import RunCheckpoints

WIDTH = 1024


def build_engine(megabytes: int) -> Replicated:
    """Trained in one step, so that the moments are there."""
    layer = 3 * 4 * WIDTH * WIDTH  # bytes of a matrix and its moments
    count = -(-megabytes * 10**6 // layer)
    engine = Replicated(distributed.build_accelerator("fp32", "cpu"))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)))
    engine.prepare(model, lambda m: torch.optim.AdamW(m.parameters(), fused=True))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    engine.step(1.0)
    return engine


def take_steps(seconds: float) -> list[float]:
    """Seconds of each, over so many together."""
    a, b = torch.randn(2, WIDTH, WIDTH)
    taken: list[float] = []
    while sum(taken) < seconds:
        began = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - began)
    return taken


def measure(engine: Replicated, directory: Path, beside: bool, turns: int) -> dict[str, Any]:
    checkpoints = RunCheckpoints(
        directory, CheckpointSettings(async_save=beside), engine, None, global_batch=1
    )
    blocked, whole, steps = [], [], []
    for step in range(1, turns + 1):
        began = time.perf_counter()
        checkpoints.save(TrainState(step=step))
        blocked.append(time.perf_counter() - began)
        save = checkpoints.under_way
        while save is not None and save.is_alive():
            steps += take_steps(0.05)
        checkpoints.finish()
        whole.append(time.perf_counter() - began)
    return {"blocked": blocked, "until_written": whole, "step": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    engine = build_engine(arguments.megabytes)
    directory = Path(tempfile.mkdtemp(prefix="save_cost_", dir=arguments.directory))
    alone = median(take_steps(2.0))
    try:
        found = {
            name: measure(engine, directory / name, beside, arguments.turns)
            for name, beside in (("in place", False), ("beside", True))
        }
    finally:
        shutil.rmtree(directory)
    size = sum(t.nbytes for t in (*engine.trained().values(), *engine.optimizer_state().values()))
    print(f"{size / 1e6:.0f} MB; seconds, median (least to most) of {arguments.turns}")
    for name, values in found.items():
        for key in ("blocked", "until_written"):
            low, middle, high = (f(values[key]) for f in (min, median, max))
            print(f"{name:<10} {key:<14} {middle:6.3f} ({low:.3f} to {high:.3f})")
    share = median(found["beside"]["blocked"]) / median(found["in place"]["blocked"])
    slower = median(found["beside"]["step"]) / alone
    print(
        f"beside blocks {share:.1%} of in place; a step takes {slower:.2f} times as long meanwhile"
    )
    result = {"environment": describe_environment(), "bytes": size, "step_alone": alone} | found
    write_atomically(arguments.out, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
