"""A disk that is full where a run writes anything but checkpoints: one line that names the file,
exit code 2, and after room is made the run goes on from its checkpoint as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_disks import fill
from tiny_runs import LORA, assert_same_run, metrics, train, write_config

from ssm_train import fit
from ssm_train.checkpoint import latest_checkpoint
from ssm_train.cli import main
from ssm_train.record import runlog
from ssm_train.record.environment import read_environment
from ssm_train.record.runlog import RunLog

LONG = {"max_steps": 40, "save_steps": 20, "skip_eval": True}
GENERATES = {"eval_gen": {"max_length": 4}, "max_steps": 6}


@contextmanager
def full_before(
    patch: pytest.MonkeyPatch, owner: Any, name: str, disk: Path, free_pages: int, call: int
) -> Iterator[list[Path]]:
    """Inside, a function finds the disk so full, from its so manieth call on."""
    original, calls, ballast = getattr(owner, name), iter(range(10**6)), []

    def wrapped(*given: Any, **named: Any) -> Any:
        if next(calls) == call:
            ballast.append(fill(disk, free_pages))
        return original(*given, **named)

    with patch.context() as inside:
        inside.setattr(owner, name, wrapped)
        yield ballast
    assert ballast, f"{name} was not called so often"


@pytest.mark.parametrize(
    ("owner", "name", "free_pages", "call", "file", "changes"),
    [
        (RunLog, "trained", 0, 20, "metrics.jsonl", LONG),
        (runlog, "write_predictions", 0, 1, "predictions-6.jsonl", GENERATES),
        (fit, "export_weights", 0, 0, "adapter", {}),
        (fit, "export_weights", 5, 0, "adapter", {}),
        (fit, "write_result", 0, 0, "result.json", {}),
        (fit, "print_summary", 0, 0, "metrics.png", {}),
    ],
    ids=["metrics", "predictions", "adapter", "tokenizer", "result", "plot"],
)
def test_a_run_ends_with_one_line_and_goes_on_later(
    owner: Any,
    name: str,
    free_pages: int,
    call: int,
    file: str,
    changes: dict[str, Any],
    tmp_path: Path,
    disks: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    survived: Callable[..., None],
) -> None:
    whole = train(write_config(tmp_path, "whole", "mamba", peft=LORA, **changes))
    disk = disks(tmp_path / "disk")
    config = write_config(tmp_path, "full", "mamba", peft=LORA, output_root=str(disk), **changes)
    run_dir = disk / "train_seed42" / "full"
    capsys.readouterr()
    with full_before(monkeypatch, owner, name, disk, free_pages, call) as ballast:
        assert main(["train", "--cfg", str(config)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run_dir / file}"), error
    assert error.count("\n") == 1 and "No space left on device; make room" in error
    assert latest_checkpoint(run_dir)[1] == []
    ballast[0].unlink()
    assert main(["train", "--cfg", str(config), "--resume"]) == 0
    assert "resuming from step-" in capsys.readouterr().out
    assert_same_run(run_dir, whole.run_dir)
    survived("a disk that is full where a run writes something else")


@pytest.mark.parametrize(("free_pages", "file"), [(1, "cfg.yaml"), (2, "environment.json")])
def test_a_run_that_cannot_begin_ends_with_one_line(
    free_pages: int,
    file: str,
    tmp_path: Path,
    disks: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = disks(tmp_path / "disk")
    config = write_config(tmp_path, "run", "mamba", output_root=str(disk), max_steps=1)
    ballast = fill(disk, free_pages)
    assert main(["train", "--cfg", str(config)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {disk / 'train_seed42' / 'run' / file}: No space left"), error
    assert error.count("\n") == 1
    ballast.unlink()
    assert main(["train", "--cfg", str(config), "--resume"]) == 0


def test_a_resume_on_a_full_disk_leaves_the_record_whole(
    tmp_path: Path, disks: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty cfg.yaml would be that of another program, to be removed with its checkpoints."""
    disk = disks(tmp_path / "disk")
    config = write_config(tmp_path, "run", "mamba", output_root=str(disk), max_steps=1)
    run_dir = train(config).run_dir
    names = ("cfg.yaml", "metrics.jsonl")
    before = {name: (run_dir / name).read_text() for name in names}
    facts = read_environment(run_dir)
    ballast = fill(disk, 0)
    assert main(["train", "--cfg", str(config), "--resume"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {name: (run_dir / name).read_text() for name in before} == before
    assert read_environment(run_dir) in (facts, facts | {"resumed": [{"step": 1, "changed": []}]})
    ballast.unlink()
    assert main(["train", "--cfg", str(config), "--resume"]) == 0


def test_a_cache_without_room_names_its_directory_and_keeps_nothing(
    tmp_path: Path, disks: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = disks(tmp_path / "disk")
    config = write_config(tmp_path, "run", "mamba", cache_dir=str(disk), max_steps=1)
    ballast = fill(disk, 1)
    assert main(["train", "--cfg", str(config)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cache_dir: {disk}") and error.count("\n") == 1, error
    assert "No space left on device; set cache_dir" in error
    assert [path for path in disk.rglob("*") if path.is_file()] == [ballast]
    ballast.unlink()
    assert main(["train", "--cfg", str(config)]) == 0


def test_a_tracker_without_room_does_not_end_training(
    tmp_path: Path, disks: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, "run", "mamba", trackers=["tensorboard"], max_steps=2)
    run_dir = tmp_path / "output" / "train_seed42" / "run"
    train(config)
    fill(disks(run_dir / "tensorboard"), 0)
    assert main(["train", "--cfg", str(config), "--resume", "max_steps=4"]) == 0
    said = capsys.readouterr().out
    assert said.count("warning: tracker tensorboard failed (OSError") == 1, said
    assert [row["step"] for row in metrics(run_dir, "train")] == [1, 2, 3, 4]
