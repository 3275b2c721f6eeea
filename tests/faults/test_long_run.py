"""Twenty thousand steps with evaluations and saves: memory, open files and the time of a step stay
as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from starts import start
from tiny_runs import LORA, write_config

STEPS = 20_000
GROWTH = 50  # KiB in a thousand steps


@pytest.mark.every_point
@pytest.mark.parametrize("family", ["gla", "mamba"])
def test_nothing_grows(family: str, tmp_path: Path, say: Callable[[str], None]) -> None:
    config = write_config(
        tmp_path, "long", family, peft=LORA, max_steps=STEPS, eval_steps=1_000, save_steps=1_000,
        logging_steps=50,
    )  # fmt: skip
    rows = tmp_path / "rows.json"
    done = start(1, Path(__file__).with_name("long_run.py"), config, rows, seconds=3_600)
    assert done.returncode == 0, done.stderr
    step, memory, files, cpu = np.array(json.loads(rows.read_text())).T
    late = step >= 2_000
    growth, _ = np.polyfit(step[late] / 1_000, memory[late], 1)
    seconds = np.diff(cpu) / np.diff(step)
    first, last = median(seconds[10:20]), median(seconds[-10:])
    say(
        f"{family}: {growth:.1f} KiB in 1,000 steps, {memory[-1] / 1024:.0f} MiB at the end, "
        f"{files[-1]:.0f} files, {1e3 * first:.2f} ms of CPU a step at first, {1e3 * last:.2f} last"
    )
    assert growth < GROWTH
    assert files[late].max() == files[late].min()
    assert last < 1.1 * first
