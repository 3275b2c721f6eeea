"""An engine in one process, without a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import ROOT, environment, run_directory, write
from tiny_runs import losses, train


@pytest.mark.parametrize("engine", ["zero2", "zero3_offload", "fsdp2"])
def test_an_engine_in_one_process(engine: str, tmp_path: Path) -> None:
    config = write(tmp_path, "gla_packed", 1)
    train(config, name="plain")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "ssm_train", "train", "--cfg", str(config)],
        env=os.environ | environment(engine) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 process on cpu under " in done.stdout and "warning" not in done.stdout
    found = losses(run_directory(tmp_path, "gla_packed"))
    assert found == pytest.approx(losses(run_directory(tmp_path, "plain")), abs=1e-5)
