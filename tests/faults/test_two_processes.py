"""Where rank 0 cannot save, or another rank does not see what it saves, all ranks hear of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_disks import REASON, fill, mount_disk
from starts import start, start_two
from tiny_runs import LORA, assert_same_tensors, exported, losses, write_config

FULL = Path(__file__).with_name("full_disk_run.py")


def write(directory: Path, name: str, **changes: Any) -> Path:
    return write_config(directory, name, "mamba", peft=LORA, batch_size=2, **changes)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """Of the run `full`, whose checkpoints get a disk of their own."""
    (tmp_path / "disk").mkdir()
    if not mount_disk(tmp_path / "disk"):
        pytest.skip(REASON)
    subprocess.run(["umount", "--lazy", str(tmp_path / "disk")], check=True)
    run_dir = tmp_path / "output" / "train_seed42" / "full"
    yield run_dir
    if os.path.ismount(run_dir / "checkpoints"):
        subprocess.run(["umount", "--lazy", str(run_dir / "checkpoints")], check=True)


def test_both_stop_where_the_disk_is_full(tmp_path: Path, run_dir: Path) -> None:
    config = write(tmp_path, "full")
    done = start(2, FULL, run_dir / "checkpoints", "train", "--cfg", config)
    assert done.returncode == 1
    for who in ("error", "error (rank 1)"):
        assert f"{who}: the checkpoint of step 3 cannot be written: " in done.stderr
    assert "No space left on device" in done.stderr


def test_both_go_on_where_that_is_asked_for(tmp_path: Path, run_dir: Path) -> None:
    """Not one checkpoint could be written: the last weights are exported, and that is said."""
    changes = {"save_errors": "continue", "async_save": True, "eval_steps": 8}
    config = write(tmp_path, "full", **changes)
    done = start(2, FULL, run_dir / "checkpoints", "train", "--cfg", config)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for step in (3, 6, 8):
        assert said.count(f"warning: the checkpoint of step {step} cannot be written: ") == 1
    whole = start(2, "-m", "ssm_train.train", "--cfg", write(tmp_path, "whole", **changes))
    assert whole.returncode == 0, whole.stderr
    assert losses(run_dir) == losses(run_dir.with_name("whole"))
    assert_same_tensors(exported(run_dir), exported(run_dir.with_name("whole")))


def test_a_directory_that_is_not_shared_ends_both(tmp_path: Path) -> None:
    """Rank 1 would start at step 0 where rank 0 resumes, or miss the best weights at the end."""
    config = write(tmp_path, "apart", output_root="output")
    places = [tmp_path / "node0", tmp_path / "node1"]
    for place in places:
        place.mkdir()
    ended = start_two("-m", "ssm_train.train", "--cfg", config, places=places)
    assert [code for code, _ in ended] == [2, 2], ended
    for _, error in ended:
        assert "ranks [1] of 2 do not see output/train_seed42/apart/checkpoints" in error
        assert "must be on a file system that all nodes share" in error


@pytest.mark.parametrize(
    ("resume", "free_pages", "file"), [(False, 2, "environment.json"), (True, 16, "metrics.jsonl")]
)
def test_both_stop_where_rank_0_cannot_write(
    resume: bool, free_pages: int, file: str, tmp_path: Path, disks: Callable[[Path], Path]
) -> None:
    disk = disks(tmp_path / "disk")
    config = write(tmp_path, "full", output_root=str(disk), skip_eval=True, save_steps=999)
    command = ["-m", "ssm_train.train", "--cfg", config, "max_steps=400"]
    if resume:
        done = start(2, *command[:-1], "max_steps=2")
        assert done.returncode == 0, done.stderr
        command.append("--resume")
    fill(disk, free_pages)
    ended = start_two(*command)
    assert [code for code, _ in ended] == [2, 2], ended
    for who, (_, error) in zip(("error", "error (rank 1)"), ended, strict=True):
        where = disk / "train_seed42" / "full" / file
        assert f"{who}: {where}: No space left on device; make room" in error, error
        assert "Traceback" not in error
