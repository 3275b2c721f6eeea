"""Saves beside the training never mix two steps and are waited for; the shortest of tests/faults:
kills at some write points, one bad byte in each file."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import FIRST, Saved, flip_a_bit, fork, kill_at, save_two, spoil
from tiny_runs import LORA, assert_same_run, stop_in_step, train, write_config

from ssm_train import durable
from ssm_train.checkpoint import checkpoint_path, latest_checkpoint
from ssm_train.loop import TrainState
from ssm_train.resume import find_resume_point

pytestmark = pytest.mark.usefixtures("no_plot")


@pytest.fixture(scope="module", params=["lora", "sd_lora"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_two(tmp_path_factory.mktemp(request.param), request.param, async_save=True)


@pytest.mark.parametrize("point", [FIRST, "optimizer.safetensors written", "directory synced"])
def test_killed_before_the_rename(saved: Saved, point: str) -> None:
    check_kill(saved, point, 2)


@pytest.mark.parametrize("point", ["renamed", "pruned one renamed"])
def test_killed_after_the_rename(saved: Saved, point: str) -> None:
    check_kill(saved, point, 3)


def check_kill(saved: Saved, point: str, step: int) -> None:
    run_dir = saved.copy(f"killed at {point}")
    saved.trained.put_back(saved.kept[3])
    killed = fork(partial(saved.trained.save, run_dir, 3), kill_at((point, 1)))
    assert killed == -signal.SIGKILL
    found, notes = find_resume_point(run_dir)
    assert found is not None and found.step == step and len(notes) == 1
    if step == 2:  # Python gives a child other random numbers than its parent has
        saved.trained.assert_resumes(run_dir, saved.kept, 2)


def test_a_bad_byte_in_each_file(saved: Saved) -> None:
    for file in sorted(checkpoint_path(saved.directory, 2).iterdir()):
        before = spoil(file, flip_a_bit, 60)
        found, notes = find_resume_point(saved.directory)
        assert found is not None and found.step == 1
        assert f"step-00000002: {file.name} " in notes[0]
        file.write_bytes(before)


# ---------------------------------------------------------------- beside the training


def test_steps_while_a_save_is_written_do_not_reach_it(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = saved.copy("moved on")
    moved_on, compared, kept = threading.Event(), threading.Event(), dict(saved.kept)
    threads: list[threading.Thread] = []

    def hold(_: str) -> None:
        if threading.current_thread() not in threads:
            threads.append(threading.current_thread())
        event = moved_on if threads[0] is threading.current_thread() else compared
        event.wait(20)

    monkeypatch.setattr(durable, "at_write_point", hold)
    saved.trained.put_back(kept[3])
    checkpoints = saved.trained.checkpoints(run_dir)
    state = TrainState(step=3, tokens=30)
    checkpoints.save(state)
    for step in (4, 5):
        kept[step] = saved.trained.move_on(step)
        state.step, state.tokens, state.best = step, 10 * step, {"loss": 0.0}
    assert not checkpoint_path(run_dir, 3).exists()
    moved_on.set()
    checkpoints.save(state)  # waits for the one before
    assert checkpoint_path(run_dir, 3).exists()
    found, _ = find_resume_point(run_dir)
    assert found is not None and found.state["train"]["best"] == {}
    saved.trained.assert_resumes(run_dir, kept, 3)
    compared.set()
    checkpoints.finish()
    saved.trained.assert_resumes(run_dir, kept, 5)


def is_of_save(thread: str) -> bool:
    return thread.startswith("save of step")


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Every write takes longer than a step; yields the points and their threads."""
    seen: list[tuple[str, str]] = []

    def note(name: str) -> None:
        seen.append((name, threading.current_thread().name))
        time.sleep(0.01)

    monkeypatch.setattr(durable, "at_write_point", note)
    yield seen


def test_a_run_s_checkpoints_are_those_of_one_that_waits(
    tmp_path: Path, slow_disk: list[tuple[str, str]]
) -> None:
    changes = {"peft": LORA, "save_total_limit": 10, "save_steps": 1}
    waits = train(write_config(tmp_path, "waits", "mamba", **changes))
    assert {thread for _, thread in slow_disk if is_of_save(thread)} == set()
    slow_disk.clear()
    beside = train(write_config(tmp_path, "beside", "mamba", async_save=True, **changes))
    of_saves = [thread for _, thread in slow_disk if is_of_save(thread)]
    assert list(dict.fromkeys(of_saves)) == [f"save of step {step}" for step in range(1, 9)]
    assert of_saves == sorted(of_saves)  # one after the other
    assert_same_run(beside.run_dir, waits.run_dir)
    for step in range(1, 9):
        ours, theirs = (
            json.loads((checkpoint_path(run.run_dir, step) / "manifest.json").read_text())
            for run in (beside, waits)
        )
        assert ours == theirs, step


def test_a_stop_waits_for_its_checkpoint(
    tmp_path: Path, slow_disk: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, "stopped", "mamba", peft=LORA, async_save=True)
    stop_in_step(monkeypatch, 4)
    result = train(config)
    assert result.outcome == "stopped"
    assert latest_checkpoint(result.run_dir) == (checkpoint_path(result.run_dir, result.steps), [])


def test_an_error_in_training_waits_for_the_checkpoint(
    tmp_path: Path, slow_disk: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssm_train import ready

    original = ready.make_batches

    def make_batches(dataset, order, cfg, k):
        if k == 3:
            raise RuntimeError("no batch")
        return original(dataset, order, cfg, k)

    monkeypatch.setattr(ready, "make_batches", make_batches)
    config = write_config(tmp_path, "failed", "mamba", peft=LORA, async_save=True)
    with pytest.raises(RuntimeError, match="no batch"):
        train(config)
    run_dir = tmp_path / "output" / "train_seed42" / "failed"
    assert latest_checkpoint(run_dir) == (checkpoint_path(run_dir, 3), [])


def test_a_mistake_of_ours_in_the_thread_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(name: str) -> None:
        if is_of_save(threading.current_thread().name):
            raise RuntimeError(f"at {name}")

    monkeypatch.setattr(durable, "at_write_point", break_down)
    config = write_config(
        tmp_path, "broken", "mamba", peft=LORA, async_save=True, save_errors="continue"
    )
    with pytest.raises(RuntimeError, match=f"at {FIRST}"):
        train(config)


def test_the_last_save_before_a_stop_must_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 75 says that the run is saved. Here nothing can be: its place is a file."""
    from ssm_train.cli import main
    from ssm_train.train import claim_directory

    def spoil_place(ready, *others):
        claim_directory(ready, *others)
        (ready.run_dir / "checkpoints").touch()

    monkeypatch.setattr("ssm_train.train.claim_directory", spoil_place)
    config = write_config(tmp_path, "lost", "mamba", peft=LORA, save_errors="continue")
    stop_in_step(monkeypatch, 1)
    assert main(["train", "--cfg", str(config)]) == 2
    said = capsys.readouterr()
    assert "warning: the checkpoint of step 2 cannot be written" in " ".join(said.out.split())
    assert said.err.startswith("error: the checkpoint of step 2 cannot be written")
    assert "File exists" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("beside", [False, True], ids=["in place", "beside the training"])
def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    beside: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rmdir = os.rmdir

    def keep(path: str, **named: Any) -> None:
        if str(path).endswith("step-00000003.tmp"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        rmdir(path, **named)

    monkeypatch.setattr(os, "rmdir", keep)
    config = write_config(
        tmp_path, "kept", "mamba", peft=LORA, async_save=beside, save_total_limit=1,
        skip_eval=True, eval_steps=99,
    )  # fmt: skip
    assert train(config).outcome == "finished"
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("warning: an old checkpoint cannot be removed: [Errno 39]") == 1


def test_the_loss_scaler_comes_back(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fp16, which itself needs a GPU."""
    run_dir = saved.copy("scaled")

    def scaler(scale: float) -> torch.amp.GradScaler:
        made = torch.amp.GradScaler("cpu", init_scale=scale)
        made.scale(torch.ones(()))  # from when on it is there
        return made

    engine = saved.trained.engine
    monkeypatch.setattr(engine, "scaler", scaler(64.0))
    saved.trained.save(run_dir, 3)
    engine.scaler = scaler(2.0)
    found, _ = find_resume_point(run_dir)
    assert found is not None
    saved.trained.checkpoints(run_dir).restore(found)
    assert engine.scaler.state_dict() == scaler(64.0).state_dict()
