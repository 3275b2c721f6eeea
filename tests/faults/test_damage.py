"""Damage to any file of the newest checkpoint is found and named, and the one before is taken."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from kills import CASES, DAMAGES, Damage, Saved, delete, flip_a_bit, save_two, spoil
from tiny_runs import LORA, assert_same_run, stop_in_step, train, write_config

from ssm_train.checkpoint import MANIFEST, checkpoint_path, find_damage, latest_checkpoint, prune
from ssm_train.errors import InputError
from ssm_train.resume import find_resume_point

FILES = {
    "manifest.json",
    "optimizer.safetensors",
    "rng-00000.json",
    "state.json",
    "trainable.safetensors",
}
PLACES = 25  # in a file, from its first byte to its last


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_two(tmp_path_factory.mktemp(request.param), request.param)


def places_in(file: Path, damage: Damage) -> list[int]:
    if damage is delete:
        return [0]
    data = file.read_bytes()
    places = {round(k * (len(data) - 1) / (PLACES - 1)) for k in range(PLACES)}
    return sorted(place for place in places if damage(data, place) != data)  # zeros may be there


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_of_the_newest(
    saved: Saved, damage: Damage, survived: Callable[..., None]
) -> None:
    newest = checkpoint_path(saved.directory, 2)
    files = sorted(newest.iterdir())
    assert {file.name for file in files} - {"base.safetensors"} == FILES
    for file in files:
        for place in places_in(file, damage):
            before = spoil(file, damage, place)
            found, notes = find_resume_point(saved.directory)
            file.write_bytes(before)
            assert found is not None and found.step == 1, (file.name, place)
            assert notes[0].startswith(
                f"skipped a damaged checkpoint: {newest.name}: {file.name} "
            ), (file.name, place)
            assert notes[1] == "resuming from step-00000001"
            survived(f"{damage.__name__}, in a file of the newest checkpoint")
    saved.trained.assert_resumes(saved.directory, saved.kept, 2)


def test_every_bit_of_the_manifest(saved: Saved, survived: Callable[..., None]) -> None:
    """It has nothing but itself to prove it."""
    newest = checkpoint_path(saved.directory, 2)
    manifest = newest / MANIFEST
    data = manifest.read_bytes()
    for bit in range(8 * len(data)):
        place = bit // 8
        manifest.write_bytes(
            data[:place] + bytes([data[place] ^ (1 << bit % 8)]) + data[place + 1 :]
        )
        assert (find_damage(newest, hashes=False) or "").startswith(MANIFEST), bit
    manifest.write_bytes(data)
    assert find_damage(newest) is None
    survived("flip_a_bit, each of a manifest", 8 * len(data))


def test_what_was_damaged_is_resumed_bit_for_bit(saved: Saved) -> None:
    run_dir = saved.copy("both")
    spoil(checkpoint_path(run_dir, 2) / "optimizer.safetensors", flip_a_bit, 100)
    saved.trained.assert_resumes(run_dir, saved.kept, 1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_pruning_keeps_the_last_that_is_whole(saved: Saved, damage: Damage) -> None:
    """One is kept, and the newest by name is damaged after it was written."""
    run_dir = saved.copy(f"pruned-{damage.__name__}")
    spoil(checkpoint_path(run_dir, 2) / "trainable.safetensors", damage, 50)
    prune(run_dir, keep=1)
    path, _ = latest_checkpoint(run_dir)
    assert path == checkpoint_path(run_dir, 1)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pointer", ["best", "last"])
def test_a_damaged_pointer_stops_nothing(saved: Saved, pointer: str, damage: Damage) -> None:
    run_dir = saved.copy(f"pointer-{pointer}-{damage.__name__}")
    spoil(run_dir / "checkpoints" / pointer, damage, 8)
    saved.trained.assert_resumes(run_dir, saved.kept, 2)
    saved.trained.put_back(saved.kept[3])
    saved.trained.save(run_dir, 3)  # without a best step the pointer is read
    saved.trained.assert_resumes(run_dir, saved.kept, 3)

    run_dir = saved.copy(f"known-{pointer}-{damage.__name__}")
    spoil(run_dir / "checkpoints" / pointer, damage, 8)
    saved.trained.put_back(saved.kept[3])
    saved.trained.save(run_dir, 3, best=1)
    assert (run_dir / "checkpoints" / "best").read_text() == "step-00000001\n"
    assert (run_dir / "checkpoints" / "last").read_text() == "step-00000003\n"
    saved.trained.assert_resumes(run_dir, saved.kept, 3)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_one_before(
    damage: Damage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    survived: Callable[..., None],
) -> None:
    whole = train(write_config(tmp_path, "whole", "mamba", peft=LORA))
    config = write_config(tmp_path, "stopped", "mamba", peft=LORA)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 5)
        part = train(config)
    newest = checkpoint_path(part.run_dir, part.steps)
    spoil(newest / "trainable.safetensors", damage, 50)
    resumed = train(config, resume=True)
    said = capsys.readouterr().out
    assert f"skipped a damaged checkpoint: {newest.name}: trainable.safetensors" in said
    assert_same_run(resumed.run_dir, whole.run_dir)
    survived("damage to the newest checkpoint of a run")


def test_damaged_best_weights_are_said_and_the_last_are_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path, "lost", "mamba", peft=LORA, eval_steps=1, max_steps=6, learning_rate=3.0,
        lr_scheduler_type="constant", save_total_limit=1,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        stop_in_step(patch, 4)
        part = train(config)
    assert part.best_step is not None and part.best_step < 4
    spoil(checkpoint_path(part.run_dir, part.best_step) / "trainable.safetensors", flip_a_bit, 50)
    result = train(config, resume=True)
    assert (result.outcome, result.best_step) == ("finished", 6)
    said = " ".join(capsys.readouterr().out.split())
    assert f"warning: the best weights, of step {part.best_step}, are lost" in said
    assert "trainable.safetensors does not match its SHA-256); those of step 6 are taken" in said


def test_where_all_are_damaged_the_run_begins_again_and_says_so(saved: Saved) -> None:
    run_dir = saved.copy("none")
    for step in (1, 2):
        spoil(checkpoint_path(run_dir, step) / "state.json", delete, 0)
    found, notes = find_resume_point(run_dir)
    assert found is None
    assert notes == [
        "skipped a damaged checkpoint: step-00000002: state.json is missing",
        "skipped a damaged checkpoint: step-00000001: state.json is missing",
        "no checkpoint is whole: starting from step 0",
    ]


def test_where_none_can_be_read_the_run_does_not_begin_again(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the disk may pass; to begin again would write over what is there."""
    run_dir = saved.copy("unreadable")
    spoil(checkpoint_path(run_dir, 1) / "state.json", delete, 0)

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("ssm_train.checkpoint.digest", fail)
    with pytest.raises(InputError, match=r"unreadable/step-00000002: .* cannot be read \(Input"):
        find_resume_point(run_dir)
