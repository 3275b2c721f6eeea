"""A run stays in its directory: names, links, what is removed, and who may write what it writes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from tiny_runs import write_config

from ssm_train import checkpoint
from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE
from ssm_train.config import load_config, run_directory
from ssm_train.durable import replace_directory
from ssm_train.errors import InputError
from ssm_train.launch.slurm import Job, write_job
from ssm_train.lock import own
from ssm_train.record import create_run_directory

TINY = {"peft": {"peft_type": "LORA", "r": 1}, "max_steps": 2, "save_steps": 1, "skip_eval": True}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, "tiny", "mamba", **TINY, eval_steps=None)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory with a file that a run must not touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("kept")
    return tmp_path / "outside"


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "..", ".", ".hidden", "a/b", "a\\b", "~", "a\n", "", "x" * 129]
)
def test_a_name_is_one_directory_s(name: str, config: Path) -> None:
    values = config.read_text() + f"name: {name!r}\n"
    config.write_text(values.replace("'a\\n'", '"a\\n"'))
    with pytest.raises(InputError, match="is not a directory name"):
        load_config(config)


@pytest.mark.parametrize(
    "data",
    ["../../../x", "/", "..", "../..", "/etc/passwd", "a/../../b", "~/x.jsonl", ".x", "\u2215x"],
)
def test_data_names_one_directory(data: str, config: Path, tmp_path: Path) -> None:
    cfg, _ = load_config(config)
    directory = run_directory(cfg.model_copy(update={"data": data}))
    assert directory.parent.parent == tmp_path / "output"
    assert directory.resolve().is_relative_to(tmp_path / "output")


@pytest.mark.parametrize("where", ["train_seed42", "train_seed42/tiny"])
@pytest.mark.parametrize("words", [[], ["--overwrite"], ["--resume"]])
def test_a_link_out_of_the_output_root_is_not_followed(
    where: str, words: list[str], config: Path, outside: Path, tmp_path: Path
) -> None:
    (outside / "tiny").mkdir()
    for marker in (outside / "cfg.yaml", outside / "tiny" / "cfg.yaml"):
        marker.write_text("name: tiny\n")  # as if a run of ours
    link = tmp_path / "output" / where
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    before = sorted(outside.rglob("*"))
    assert main(["train", "--cfg", str(config), *words]) == BAD_INPUT
    assert sorted(outside.rglob("*")) == before


@pytest.mark.parametrize("name", ["checkpoints", "warmup", "cfg.yaml"])
def test_links_inside_of_a_run_are_refused(
    name: str, config: Path, outside: Path, tmp_path: Path
) -> None:
    assert main(["train", "--cfg", str(config)]) == DONE
    path = tmp_path / "output/train_seed42/tiny" / name
    if path.exists():
        path.rename(outside / name)
    path.symlink_to(outside / name)
    before = sorted(outside.rglob("*"))
    assert main(["train", "--cfg", str(config), "--resume", "max_steps=3"]) == BAD_INPUT
    assert main(["train", "--cfg", str(config), "--overwrite"]) == BAD_INPUT
    assert sorted(outside.rglob("*")) == before


def test_overwrite_removes_runs_alone(outside: Path, tmp_path: Path) -> None:
    """And nothing behind the links in one."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "mine").write_text("no run")
    create_run_directory(run_dir, "name: x\n", overwrite=True)
    assert (run_dir / "mine").exists()  # there was no cfg.yaml
    (run_dir / "link").symlink_to(outside)
    create_run_directory(run_dir, "name: x\n", overwrite=True)
    assert not (run_dir / "mine").exists() and (outside / "precious").exists()
    link = tmp_path / "linked"
    link.symlink_to(run_dir)
    with pytest.raises(InputError, match="symbolic link"):
        create_run_directory(link, "name: x\n", overwrite=True)
    assert (run_dir / "cfg.yaml").exists()


def test_pruning_removes_links_and_not_what_is_behind(outside: Path, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save_checkpoint(tmp_path, step, {}, {"a": 1}, [])
    os.rename(tmp_path / "checkpoints/step-00000001", outside / "moved")
    (tmp_path / "checkpoints/step-00000001").symlink_to(outside / "moved")
    (tmp_path / "checkpoints/step-00000004.tmp").symlink_to(outside)
    checkpoint.prune(tmp_path, keep=1)
    checkpoint.save_checkpoint(tmp_path, 4, {}, {"a": 1}, [])
    names = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}
    assert names == {"step-00000003", "step-00000004"}
    assert (outside / "moved" / "manifest.json").exists() and (outside / "precious").exists()


def test_a_directory_is_replaced_without_following_links(outside: Path, tmp_path: Path) -> None:
    for suffix in ("", ".old"):
        (tmp_path / f"adapter{suffix}").symlink_to(outside)
    with replace_directory(tmp_path / "adapter") as directory:
        (directory / "new").write_text("x")
    assert (tmp_path / "adapter" / "new").exists()
    assert [path.name for path in outside.iterdir()] == ["precious"]


def test_a_merge_removes_nothing_of_others(config: Path, tmp_path: Path) -> None:
    assert main(["train", "--cfg", str(config)]) == DONE
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/precious").write_text("kept")
    run_dir = tmp_path / "output/train_seed42/tiny"
    assert main(["merge", str(run_dir), "--out", str(tmp_path / "out")]) == BAD_INPUT
    assert (tmp_path / "out.partial/precious").exists()


def test_a_lock_is_not_written_through_a_link(outside: Path, tmp_path: Path) -> None:
    (outside / "precious").write_text("")  # an empty file would be taken for a lock
    (tmp_path / "run.lock").symlink_to(outside / "precious")
    with pytest.raises(InputError, match="symbolic link"), own(tmp_path / "run"):
        pass
    assert (outside / "precious").read_text() == ""


@pytest.mark.parametrize(("mask", "allowed"), [(0o000, 0o775), (0o022, 0o755), (0o077, 0o700)])
def test_modes_of_files(mask: int, allowed: int, config: Path, tmp_path: Path) -> None:
    """As the umask says, but never writable by everybody, and no file is a program."""
    before = os.umask(mask)
    try:
        assert main(["train", "--cfg", str(config)]) == DONE
    finally:
        os.umask(before)
    paths = [path for path in (tmp_path / "output").rglob("*") if not path.is_symlink()]
    assert len(paths) > 10
    for path in paths:
        mode = stat.S_IMODE(path.stat().st_mode)
        limit = allowed if path.is_dir() else allowed & 0o666
        assert not mode & ~limit, (path, oct(mode))


def test_a_job_script_is_for_those_who_may_read_it(tmp_path: Path) -> None:
    job = Job(Path("a.yaml"), 1, 1, "01:00:00", Path("b.yaml"))
    before = os.umask(0o077)
    try:
        write_job(job, tmp_path / "job.sh")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "job.sh").stat().st_mode) == 0o700
