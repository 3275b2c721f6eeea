"""A rank that dies or hangs ends the run, with a code that says so, and nothing is left running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import DEVICE, ROOT, environment, run_directory, write

FAILING = Path(__file__).with_name("failing_rank.py")
STEP = 3
PATIENCE = 4 if DEVICE == "cpu" else 20  # seconds without progress; a GPU compiles kernels


def launch(
    directory: Path, engine: str, what: str, step: int = STEP, more: str = ""
) -> subprocess.CompletedProcess[str]:
    config = write(directory, "mamba_lora", 2)
    config.write_text(f"{config.read_text()}watchdog_seconds: {PATIENCE}\n{more}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    cpu = str(DEVICE == "cpu").lower()
    variables = {"ACCELERATE_USE_CPU": cpu, "OMP_NUM_THREADS": "1", **environment(engine)}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [*torchrun, str(FAILING), what, str(step), str(config)],
        env=os.environ | variables | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def assert_none_runs(directory: Path) -> None:
    for rank in (0, 1):
        pid = int((directory / f"pid-{rank}").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_rank_that_dies_ends_the_run(engine: str, tmp_path: Path) -> None:
    done = launch(tmp_path, engine, "die")
    assert done.returncode == 1, done.stderr
    assert "Signal 9 (SIGKILL) received by PID" in done.stderr  # torchrun says which rank it was
    assert_none_runs(tmp_path)


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_a_rank_that_hangs_ends_the_run_with_all_stacks(engine: str, tmp_path: Path) -> None:
    done = launch(tmp_path, engine, "hang")
    assert done.returncode == 1, done.stderr
    assert f"no progress for {PATIENCE} s; the run ends (watchdog_seconds)" in done.stderr
    assert_none_runs(tmp_path)
    run_dir = run_directory(tmp_path, "mamba_lora")
    stacks = {rank: (run_dir / f"stacks-rank{rank}.txt").read_text() for rank in (0, 1)}
    assert "in hang" in stacks[1] and "in hang" not in stacks[0]
    assert "ssm_train/loop.py" in stacks[0]  # it waits for the other one, on a GPU some steps later


@pytest.mark.parametrize("step", [STEP, -1], ids=["training", "start"])
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_one_rank_without_memory_ends_all_with_its_line(
    engine: str, step: int, tmp_path: Path
) -> None:
    done = launch(tmp_path, engine, "memory", step)
    assert done.returncode == 1, done.stderr
    for rank in (0, 1):
        assert f"error (rank {rank}): out of memory on a batch of 2 x " in done.stderr
    assert done.stderr.count("of rank 1: lower batch_size") == 2
    assert "OutOfMemoryError" not in done.stderr and "no progress for" not in done.stderr
    assert_none_runs(tmp_path)
    assert run_directory(tmp_path, "mamba_lora").exists() == (step >= 0)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_nan_on_one_rank_skips_the_steps_of_all_and_is_named(engine: str, tmp_path: Path) -> None:
    done = launch(tmp_path, engine, "nan", more="max_bad_steps: 3\n")
    assert done.returncode == 1, done.stderr
    said = " ".join(done.stdout.split())
    assert "ended after 6 steps, the last of them bad (max_bad_steps): the first output" in said
    assert "layers.1.mixer;" in said
    rows = (run_directory(tmp_path, "mamba_lora") / "metrics.jsonl").read_text().splitlines()
    skipped = [json.loads(row)["skipped_steps"] for row in rows]
    assert skipped == [0, 0, 0, 1, 2], rows  # the row of the last one is not written any more
    assert_none_runs(tmp_path)
