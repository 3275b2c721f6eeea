"""benchmarks/quality.py: its tables have the shape that they promise, a second call goes on where
the first one stopped, and what picks learning rates and reads curves is right."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import quality  # noqa: E402
from quality_parts import rank, steps  # noqa: E402
from quality_parts.jobs import (  # noqa: E402
    Options,
    Results,
    base_directory,
    key_of,
    spread,
    sweep,
)

from ssm_train.errors import InputError  # noqa: E402


def call(out: Path, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "quality.py"), *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tables(markdown: str) -> list[list[list[str]]]:
    """Tables, their rows, their cells; without the line of dashes."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        assert set(rows[1]) == {"---"}, rows[1]
        found.append([rows[0], *rows[2:]])
    return found


@pytest.mark.slow
def test_the_table_by_rank_and_going_on(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    printed = call(out, "c", "--quick", "--seeds", "1", "--device", "cpu")
    by_rank, summary = tables(out.with_suffix(".md").read_text())
    assert [row[:2] for row in by_rank[1:]] == [
        [method, rank] for method in ("LoRA", "rsLoRA") for rank in ("4", "16")
    ]
    assert all(len(row) == len(by_rank[0]) for row in by_rank)
    assert all(0 < float(cell) < math.inf for row in by_rank[1:] for cell in row[2:])
    assert [row[0] for row in summary[1:]] == ["LoRA", "rsLoRA"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert out.with_suffix(".md").read_text() in printed

    options = Options(1, True, ("gla", "mamba"), {}, out.with_suffix(".work"), "cpu", "auto")
    done = Results.read(out)
    assert quality.missing_jobs(["c"], done, options, {}) == []
    base, *_, lost = [job for job, _ in done]
    del done.rows[key_of(lost)]
    assert quality.missing_jobs(["c"], done, options, {}) == [lost]
    assert quality.missing_jobs(["c"], done, options, {key_of(lost): "failed"}) == []
    shutil.rmtree(base_directory(base, options))
    done.forget_bases(options)
    assert quality.missing_jobs(["c"], done, options, {}) == [base]


def test_the_sweep_goes_beyond_its_grid_until_the_best_rate_is_inside(tmp_path: Path) -> None:
    done, asked = Results(tmp_path / "found.json"), []
    while True:
        jobs, rate = sweep(
            done, lambda r: {"rate": r}, (1.0, 2.0), lambda found: abs(found["rate"] - 8)
        )
        if rate is not None:
            break
        for job in jobs:
            asked.append(job["rate"])
            done.add(job, {"rate": job["rate"]})
    assert rate == 8
    assert asked == [1, 2, 4, 8, 16]


def test_results_are_read_back(tmp_path: Path) -> None:
    done = Results(tmp_path / "found.json")
    done.add({"part": "x", "rate": 0.001}, {"loss": 2.5})
    read = Results.read(done.path)
    assert {"rate": 0.001, "part": "x"} in read
    assert read[{"part": "x", "rate": 0.001}]["loss"] == 2.5
    assert {"part": "x", "rate": 0.002} not in read
    done.path.write_text('{"other": 1}')
    with pytest.raises(InputError, match="holds no results of this command"):
        Results.read(done.path)


def test_steps_to_a_loss_are_those_of_the_smoothed_curve() -> None:
    losses = [9.0, 5.0, 1.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0]  # one low value does not count
    found = {"outcome": "finished", "losses": [(10 * i, loss) for i, loss in enumerate(losses)]}
    assert steps.steps_to(2.0, found) == 80  # median of 4, 3, 2, 1, 1
    assert steps.last_loss(found) == 1.0
    assert steps.steps_to(0.5, found) is None
    assert steps.last_loss({**found, "outcome": "bad_loss"}) == math.inf


def test_the_slope_is_that_of_a_power_law() -> None:
    assert rank.slope([(r, 3 * r**-0.5) for r in (4, 16, 256)]) == pytest.approx(-0.5)
    assert spread([3.0, 1.0, 2.0]) == "2 (1 to 3)"
