"""`accelerate launch` itself: the engine that its config asks for runs; its traps are errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import NAMES, ROOT, run_directory, write
from tiny_runs import losses

CONFIGS = ROOT / "accelerate_configs" / "one_node"


def launch(config: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """From the repository's root, where DeepSpeed's configs are found."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    return subprocess.run(
        [*accelerate, *flags, "-m", "ssm_train.train", "--cfg", str(config)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables,
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def on_cpu(config: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """On two processes."""
    port = ("--main_process_port", "0")
    return launch(config, *flags, "--num_processes", "2", *port, ACCELERATE_USE_CPU="true")


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_a_shipped_config_starts_its_engine(engine: str, tmp_path: Path) -> None:
    config = write(tmp_path, "mamba_lora", 2)
    done = on_cpu(config, "--config_file", str(CONFIGS / f"{engine}_fp32.yaml"))
    assert done.returncode == 0, done.stderr
    assert f"2 processes on cpu under {NAMES[engine]}" in done.stdout
    assert len(losses(run_directory(tmp_path, "mamba_lora"))) == 20


def test_one_process_in_place_of_two_is_an_error(tmp_path: Path) -> None:
    done = launch(write(tmp_path, "mamba_lora", 2), "--cpu", "--num_processes", "2")
    assert done.returncode != 0
    assert "asks for 2 processes, but 1 runs" in done.stderr
    assert not run_directory(tmp_path, "mamba_lora").exists()


def test_another_precision_is_an_error(tmp_path: Path) -> None:
    config = write(tmp_path, "mamba_lora", 2)
    done = on_cpu(config, "--config_file", str(CONFIGS / "ddp_bf16.yaml"))
    assert done.returncode != 0
    assert "is 'bf16', but prec of the run is 'fp32'" in done.stderr


def test_deepspeed_without_a_config_is_no_plain_ddp(tmp_path: Path) -> None:
    """Accelerate alone would run DDP here, as CPUs are asked for."""
    done = on_cpu(write(tmp_path, "mamba_lora", 2), "--use_deepspeed", "--mixed_precision", "no")
    assert done.returncode != 0
    assert "set deepspeed_config_file" in done.stderr
