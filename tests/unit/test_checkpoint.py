"""A kill at any write point and damage to any file leave a checkpoint to resume from."""

import errno
import json
import os
import random
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssm_train import checkpoint, durable
from ssm_train.checkpoint import (
    checkpoint_path,
    find_damage,
    latest_checkpoint,
    load_checkpoint,
    prune,
    read_pointer,
    save_checkpoint,
    write_pointer,
)
from ssm_train.durable import sync
from ssm_train.errors import InputError
from ssm_train.optim import OptimSettings, build_optimizer
from ssm_train.snapshot import (
    collect_rng,
    load_optimizer_tensors,
    load_parameters,
    optimizer_tensors,
    restore_rng,
    trainable_tensors,
)


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def tensors_of(value):
    return {
        "trainable": {"w": torch.full((3, 2), float(value))},
        "optimizer": {"w.exp_avg": torch.full((3, 2), value / 2)},
        "base": {"base.w": torch.full((5,), value, dtype=torch.bfloat16)},
    }


def save(run_dir, step, value=None):
    value = step if value is None else value
    return save_checkpoint(
        run_dir, step, tensors_of(value), {"tokens": 10 * value}, [collect_rng()]
    )


def value_in(path):
    loaded = load_checkpoint(path)
    assert loaded.state["tokens"] == 10 * loaded.tensors["trainable"]["w"][0, 0]
    return int(loaded.tensors["trainable"]["w"][0, 0])


def points_of(monkeypatch, action):
    names = []
    with monkeypatch.context() as patch:
        patch.setattr(durable, "at_write_point", names.append)
        action()
    return names


def kill_at(index):
    seen = []

    def write_point(name):
        seen.append(name)
        if len(seen) > index:
            raise Killed(name)

    return write_point


def names_in(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    loaded = load_checkpoint(path)
    for group, named in tensors_of(7).items():
        for name, tensor in named.items():
            assert torch.equal(loaded.tensors[group][name], tensor)
            assert loaded.tensors[group][name].dtype == tensor.dtype
    assert loaded.state == {"tokens": 70, "step": 7}
    assert (loaded.step, loaded.world_size) == (7, 1)
    assert read_pointer(tmp_path, "last") == 7
    assert read_pointer(tmp_path, "best") is None


def test_an_empty_group_makes_no_file(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"trainable": {"w": torch.ones(1)}, "base": {}}, {}, [])
    assert not (path / "base.safetensors").exists()
    assert set(load_checkpoint(path).tensors) == {"trainable"}


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    flat = torch.arange(6.0)
    views = {"a": flat[:4].view(2, 2), "b": flat[4:], "transposed": flat.view(2, 3).T}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"trainable": views}, {}, []))
    assert all(torch.equal(loaded.tensors["trainable"][k], v) for k, v in views.items())


def test_kill_at_every_write_point_of_the_next_save(tmp_path, monkeypatch):
    save(tmp_path / "probe", 1)
    names = points_of(monkeypatch, lambda: save(tmp_path / "probe", 2))
    assert len(names) >= 12 and len(set(names)) == len(names)
    renamed = names.index("renamed")
    for index, name in enumerate(names):
        run_dir = tmp_path / f"run{index}"
        save(run_dir, 1)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "at_write_point", kill_at(index))
            with pytest.raises(Killed, match=name):
                save(run_dir, 2)
        path, skipped = latest_checkpoint(run_dir)
        assert value_in(path) == (2 if index >= renamed else 1), name
        assert skipped == [], name
        save(run_dir, 3)
        assert value_in(latest_checkpoint(run_dir)[0]) == 3
        assert not [n for n in names_in(run_dir) if n.endswith((".tmp", ".old"))], name


def test_kill_at_every_write_point_while_the_same_step_is_replaced(tmp_path, monkeypatch):
    save(tmp_path / "probe", 5, 1)
    names = points_of(monkeypatch, lambda: save(tmp_path / "probe", 5, 2))
    assert "old one moved aside" in names
    for index, name in enumerate(names):
        run_dir = tmp_path / f"run{index}"
        save(run_dir, 5, 1)  # the only checkpoint
        with monkeypatch.context() as patch:
            patch.setattr(durable, "at_write_point", kill_at(index))
            with pytest.raises(Killed):
                save(run_dir, 5, 2)
        assert value_in(latest_checkpoint(run_dir)[0]) == (
            2 if index >= names.index("renamed") else 1
        ), name
        save(run_dir, 5, 3)
        assert value_in(latest_checkpoint(run_dir)[0]) == 3, name
        assert names_in(run_dir) == ["last", "step-00000005"], name


def test_kill_while_pruning(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "at_write_point", kill_at(0))
        with pytest.raises(Killed):
            prune(tmp_path, keep=1)
    assert value_in(latest_checkpoint(tmp_path)[0]) == 3
    save(tmp_path, 4)
    prune(tmp_path, keep=1)
    assert names_in(tmp_path) == ["last", "step-00000004"]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-3])


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def fill_with_zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def delete(file):
    file.unlink()


FILES = (
    "trainable.safetensors",
    "optimizer.safetensors",
    "base.safetensors",
    "state.json",
    "rng-00000.json",
    "manifest.json",
)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, fill_with_zeros, delete])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_and_named_and_the_older_one_is_taken(tmp_path, file, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert sorted(p.name for p in newest.iterdir()) == sorted(FILES)
    damage(newest / file)
    path, skipped = latest_checkpoint(tmp_path)
    assert value_in(path) == 1
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0] and file in skipped[0]
    with pytest.raises(InputError, match=file):
        load_checkpoint(newest)


def test_a_checkpoint_under_another_name_is_not_that_step(tmp_path):
    shutil.copytree(save(tmp_path, 1), checkpoint_path(tmp_path, 9))
    path, skipped = latest_checkpoint(tmp_path)
    assert value_in(path) == 1 and "of step 1" in skipped[0]


def test_nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path) == (None, [])


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    write_pointer(tmp_path, "best", 2)
    removed = prune(tmp_path, keep=2, protect=[read_pointer(tmp_path, "best")])
    assert [path.name for path in removed] == [f"step-0000000{k}" for k in (4, 3, 1)]
    assert names_in(tmp_path) == ["best", "last", *(f"step-0000000{k}" for k in (2, 5, 6))]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete])
def test_prune_never_removes_the_last_that_is_whole(tmp_path, damage):
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(checkpoint_path(tmp_path, 2) / "trainable.safetensors")
    damage(checkpoint_path(tmp_path, 3) / "optimizer.safetensors")
    prune(tmp_path, keep=1)
    assert value_in(latest_checkpoint(tmp_path)[0]) == 1


def test_the_newest_that_is_whole_stays_where_the_best_one_is_whole_too(tmp_path):
    """A run that went on from before a damaged checkpoint: what it saves next is an older step."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_a_bit(checkpoint_path(tmp_path, 3) / "optimizer.safetensors")
    prune(tmp_path, keep=1, protect=[1])
    assert value_in(latest_checkpoint(tmp_path)[0]) == 2


def test_nothing_is_removed_where_nothing_can_be_read(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    for name in ("read_text", "is_file"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, fail)
            assert prune(tmp_path, keep=1) == []
            assert "cannot be read (Input/output error)" in find_damage(
                checkpoint_path(tmp_path, 3)
            )
    assert value_in(latest_checkpoint(tmp_path)[0]) == 3


# ---------------------------------------------------------------- network disks


def held_open(monkeypatch, *names):
    """Directories of these names cannot be removed: NFS keeps a file that is read in them."""
    rmdir = os.rmdir

    def keep(path, *given, **named):
        if Path(path).name in names:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmdir(path, *given, **named)

    monkeypatch.setattr(os, "rmdir", keep)


def test_what_cannot_be_removed_is_said_and_tried_again(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        held_open(patch, "step-00000001.tmp")
        with pytest.raises(OSError, match="Directory not empty"):
            prune(tmp_path, keep=1)
        save(tmp_path, 4)  # which does not fail
        assert names_in(tmp_path) == [
            "last", "step-00000001.tmp", "step-00000003", "step-00000004"
        ]  # fmt: skip
    save(tmp_path, 5)
    assert names_in(tmp_path) == ["last", *(f"step-0000000{k}" for k in (3, 4, 5))]


def test_a_step_that_was_saved_before_and_cannot_be_removed(tmp_path, monkeypatch):
    save(tmp_path, 1, value=1)
    held_open(monkeypatch, "step-00000001.old")
    save(tmp_path, 1, value=2)
    assert value_in(latest_checkpoint(tmp_path)[0]) == 2


def test_a_rename_that_reports_an_error_though_it_happened(tmp_path, monkeypatch):
    replace = Path.replace

    def lose_the_answer(self, to):
        replace(self, to)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))

    save(tmp_path, 1, value=1)
    monkeypatch.setattr(Path, "replace", lose_the_answer)
    for value in (2, 3):
        save(tmp_path, 1, value)
        assert value_in(latest_checkpoint(tmp_path)[0]) == value
    save(tmp_path, 2)
    assert [path.name for path in prune(tmp_path, keep=1)] == ["step-00000001"]
    assert names_in(tmp_path) == ["last", "step-00000002"]


def test_a_rename_that_did_not_happen_is_an_error(tmp_path, monkeypatch):
    def fail(self, to):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))

    save(tmp_path, 1, value=1)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(FileNotFoundError):
        save(tmp_path, 1, value=2)
    monkeypatch.undo()
    assert value_in(latest_checkpoint(tmp_path)[0]) == 1


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_a_sync_that_fails(tmp_path, monkeypatch, directory, number):
    """Fails the save and leaves nothing; but some network disks cannot sync a directory at all."""
    save(tmp_path, 1)
    fsync = os.fsync

    def fail(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode) == directory:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    if directory and number == errno.EINVAL:
        save(tmp_path, 2)
        assert value_in(latest_checkpoint(tmp_path)[0]) == 2
        return
    with pytest.raises(OSError, match=os.strerror(number)):
        save(tmp_path, 2)
    assert value_in(latest_checkpoint(tmp_path)[0]) == 1
    assert names_in(tmp_path) == ["last", "step-00000001"]


def test_what_shows_up_late_is_waited_for(tmp_path, monkeypatch):
    late = tmp_path / "late"
    threading.Timer(0.3, late.touch).start()
    assert durable.appears(late)
    monkeypatch.setattr(durable, "SECONDS_TO_APPEAR", 0.2)
    assert not durable.appears(tmp_path / "never")


def test_each_rank_gets_its_own_random_states(tmp_path):
    rngs = [collect_rng(), collect_rng() | {"cuda": "that of rank 1"}]
    path = save_checkpoint(tmp_path, 4, tensors_of(4), {"tokens": 40}, rngs)
    assert latest_checkpoint(tmp_path) == (path, [])
    assert load_checkpoint(path, rank=1).rng["cuda"] == "that of rank 1"
    assert load_checkpoint(path, rank=1).world_size == 2
    assert load_checkpoint(path, rank=2).rng is None  # resumed on more processes


def test_every_file_is_synced_before_the_rename_and_its_name_after(tmp_path, monkeypatch):
    """A kill loses nothing that was written; a crash of the machine loses what was not synced."""
    seen = []
    monkeypatch.setattr(durable, "at_write_point", seen.append)
    for module in (checkpoint, durable):
        monkeypatch.setattr(module, "sync", lambda path: (seen.append(path), sync(path)))
    path = save(tmp_path, 2)
    partial = path.with_name(path.name + ".tmp")
    renamed = seen.index("renamed")
    assert {partial / name for name in FILES} | {partial} == {
        place for place in seen[:renamed] if not isinstance(place, str)
    }
    assert seen[renamed + 1] == path.parent
    last = seen.index("last written")
    assert seen[last + 1] == path.with_name("last.tmp")
    assert seen[seen.index("last renamed") + 1] == path.parent


def test_no_file_is_a_pickle(tmp_path):
    path = save(tmp_path, 1)
    for file in path.glob("*.json"):
        json.loads(file.read_text())
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    assert find_damage(path) is None


# ---------------------------------------------------------------- random states


def draw():
    return (
        [random.random(), random.gauss(0, 1), random.gauss(0, 1), random.getrandbits(70)],
        np.random.normal(size=3).tolist() + np.random.randint(0, 2**31, 3).tolist(),
        torch.randn(5).tolist() + torch.randperm(7).tolist(),
    )


def test_random_states_come_back_exactly():
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    random.gauss(0, 1)  # each leaves a second normal number waiting in the state
    np.random.normal()
    torch.randn(1)
    saved = json.loads(json.dumps(collect_rng()))
    expected = draw()
    assert draw() != expected
    restore_rng(saved)
    assert draw() == expected


# ---------------------------------------------------------------- parameters and optimizer


def toy(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 2))
    model[0].bias.requires_grad_(False)
    return model, build_optimizer(model, OptimSettings(weight_decay=0.1), ())


def run_steps(model, optimizer, steps):
    for step in steps:
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        loss = model(torch.randn(6, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_steps_saved_and_resumed_equal_a_straight_run_bit_for_bit(tmp_path):
    model, optimizer = toy(0)
    frozen = model[0].bias.clone()
    run_steps(model, optimizer, range(3))
    path = save_checkpoint(
        tmp_path,
        3,
        {
            "trainable": trainable_tensors(model),
            "optimizer": optimizer_tensors(optimizer, model.named_parameters()),
        },
        {},
        [collect_rng()],
    )
    run_steps(model, optimizer, range(3, 8))

    resumed, fresh = toy(1)
    resumed[0].bias.data.copy_(frozen)  # frozen weights come from the base model
    run_steps(resumed, fresh, range(2))  # what is loaded replaces a state that is already there
    loaded = load_checkpoint(path)
    load_parameters(resumed, loaded.tensors["trainable"])
    load_optimizer_tensors(fresh, loaded.tensors["optimizer"], resumed.named_parameters())
    restore_rng(loaded.rng)
    run_steps(resumed, fresh, range(3, 8))

    assert set(loaded.tensors["trainable"]) == {"0.weight", "3.weight", "3.bias"}
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    straight = optimizer_tensors(optimizer, model.named_parameters())
    again = optimizer_tensors(fresh, resumed.named_parameters())
    assert straight["3.bias.step"] == 8 and len(straight) == 9
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_a_checkpoint_of_another_run_is_refused_with_the_names():
    model, optimizer = toy(0)
    run_steps(model, optimizer, range(1))
    trained = trainable_tensors(model)
    state = optimizer_tensors(optimizer, model.named_parameters())
    with pytest.raises(InputError, match="lacks '3.bias'"):
        load_parameters(model, {k: v for k, v in trained.items() if k != "3.bias"})
    with pytest.raises(InputError, match="'other'"):
        load_parameters(model, {**trained, "other": torch.ones(1)})
    with pytest.raises(InputError, match=r"\[3\].*\[2\]"):
        load_parameters(model, {**trained, "3.bias": torch.ones(3)})
    with pytest.raises(InputError, match="'0.bias'"):
        load_optimizer_tensors(
            optimizer, {**state, "0.bias.step": torch.ones(())}, model.named_parameters()
        )
