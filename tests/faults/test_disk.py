"""A full disk and a read-only one: one clear error, earlier checkpoints whole, nothing left over.
With `save_errors: continue` training goes on, and the next save tries again."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kills import CASES, FIRST, Saved, names_in, save_two
from small_disks import PAGE, fill, mount, mount_disk
from tiny_runs import LORA, assert_same_run, train, write_config

from ssm_train import durable
from ssm_train.cli import main
from ssm_train.errors import InputError


def pages(directory: Path) -> int:
    """Of a checkpoint, with a page to spare for each pointer."""
    return 2 + sum(-(-path.stat().st_size // PAGE) for path in directory.iterdir())


def on_disk(saved: Saved, disk: Path) -> Path:
    run_dir = disk / "run"
    subprocess.run(["cp", "-r", str(saved.directory), str(run_dir)], check=True)
    return run_dir


def refuse(saved: Saved, run_dir: Path, reason: str) -> None:
    """The save of step 3 fails with one line."""
    saved.trained.put_back(saved.kept[3])
    with pytest.raises(InputError) as caught:
        saved.trained.save(run_dir, 3)
    said = str(caught.value)
    assert said.startswith("the checkpoint of step 3 cannot be written: ") and "\n" not in said
    assert reason in said and str(run_dir) in said and "go on with --resume" in said


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_two(tmp_path_factory.mktemp(request.param), request.param)


def test_a_disk_that_is_full_at_any_page(
    saved: Saved,
    disks: Callable[[Path], Path],
    tmp_path: Path,
    survived: Callable[..., None],
) -> None:
    disk = disks(tmp_path / "disk")
    run_dir = on_disk(saved, disk)
    before = names_in(run_dir)
    needed = pages(run_dir / "checkpoints" / "step-00000002")
    for free in range(needed - 2):
        ballast = fill(disk, free)
        refuse(saved, run_dir, "No space left on device")
        assert names_in(run_dir) == before, free
        saved.trained.assert_resumes(run_dir, saved.kept, 2)
        ballast.unlink()
        survived("a disk that is full at a page of a save")
    saved.trained.put_back(saved.kept[3])
    fill(disk, needed)
    saved.trained.save(run_dir, 3)
    saved.trained.assert_resumes(run_dir, saved.kept, 3)


def test_no_room_for_a_pointer(saved: Saved, disks: Callable[[Path], Path], tmp_path: Path) -> None:
    """The checkpoint is whole, and counts."""
    disk = disks(tmp_path / "disk")
    run_dir = on_disk(saved, disk)
    fill(disk, pages(run_dir / "checkpoints" / "step-00000002") - 2)
    refuse(saved, run_dir, "No space left on device")
    saved.trained.assert_resumes(run_dir, saved.kept, 3)
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


def test_a_read_only_disk(saved: Saved, disks: Callable[[Path], Path], tmp_path: Path) -> None:
    disk = disks(tmp_path / "disk")
    run_dir = on_disk(saved, disk)
    before = names_in(run_dir)
    assert mount("-o", "remount,bind,ro", str(disk))
    refuse(saved, run_dir, "Read-only file system")
    saved.trained.assert_resumes(run_dir, saved.kept, 2)
    assert names_in(run_dir) == before
    assert mount("-o", "remount,bind,rw", str(disk))
    saved.trained.put_back(saved.kept[3])
    saved.trained.save(run_dir, 3)
    saved.trained.assert_resumes(run_dir, saved.kept, 3)


@pytest.mark.parametrize("point", ["directory made", "trainable.safetensors synced", "renamed"])
def test_a_disk_that_turns_read_only_in_a_save(
    point: str,
    saved: Saved,
    disks: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a disk with errors does. What is half written cannot be removed then, and counts for
    nothing; the next save removes it."""
    disk = disks(tmp_path / "disk")
    run_dir = on_disk(saved, disk)

    def turn(name: str) -> None:
        if name == point:
            assert mount("-o", "remount,bind,ro", str(disk))

    with monkeypatch.context() as patch:
        patch.setattr(durable, "at_write_point", turn)
        refuse(saved, run_dir, "Read-only file system")
    saved.trained.assert_resumes(run_dir, saved.kept, 3 if point == "renamed" else 2)
    assert mount("-o", "remount,bind,rw", str(disk))
    saved.trained.put_back(saved.kept[3])
    saved.trained.save(run_dir, 3)
    saved.trained.assert_resumes(run_dir, saved.kept, 3)
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def full_in_the_second_save(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[Path], None]]:
    """Checkpoints of a run get a disk of their own, which is full in the second save only."""
    with ExitStack() as stack:

        def arm(run_dir: Path) -> None:
            disk, saves = run_dir / "checkpoints", Counter[str]()

            def hook(name: str) -> None:
                saves[name] += 1
                if name != FIRST:
                    return
                if saves[name] == 1:
                    assert mount_disk(disk)
                    stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
                elif saves[name] == 2:
                    fill(disk, 3)
                else:
                    (disk / "ballast").unlink(missing_ok=True)

            monkeypatch.setattr(durable, "at_write_point", hook)

        yield arm


@pytest.mark.parametrize("beside", [False, True], ids=["in place", "beside the training"])
def test_training_goes_on_and_tries_again(
    beside: bool,
    tmp_path: Path,
    disks: Callable[[Path], Path],
    full_in_the_second_save: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    disks(tmp_path / "can be mounted")
    changes = {"peft": LORA, "save_errors": "continue", "async_save": beside}
    whole = train(write_config(tmp_path, "whole", "mamba", **changes))
    assert "warning" not in capsys.readouterr().out
    full_in_the_second_save(whole.run_dir.with_name("full"))
    result = train(write_config(tmp_path, "full", "mamba", **changes))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("warning: the checkpoint of step 4 cannot be written: ") == 1
    assert said.count("warning") == 1
    assert "training goes on, and the next save tries again" in said
    assert result.outcome == "finished"
    assert_same_run(result.run_dir, whole.run_dir)


@pytest.mark.parametrize("beside", ["false", "true"], ids=["in place", "beside the training"])
def test_the_run_stops_with_one_line_and_goes_on_later(
    beside: str,
    tmp_path: Path,
    disks: Callable[[Path], Path],
    full_in_the_second_save: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    disks(tmp_path / "can be mounted")
    whole = train(write_config(tmp_path, "whole", "mamba", peft=LORA))
    run_dir = whole.run_dir.with_name("full")
    config = write_config(tmp_path, "full", "mamba", peft=LORA)
    full_in_the_second_save(run_dir)
    command = ["train", "--cfg", str(config), f"async_save={beside}"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the checkpoint of step 4 cannot be written: ")
    assert error.count("\n") == 1 and "No space left on device" in error
    assert names_in(run_dir) == ["ballast", "last", "step-00000003"]
    assert main([*command, "--resume"]) == 0
    assert "resuming from step-00000003" in capsys.readouterr().out
    assert_same_run(run_dir, whole.run_dir)
