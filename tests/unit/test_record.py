"""Who may use a run directory, and what is written down about a run."""

import json
import os

import pytest

from ssm_train.errors import InputError
from ssm_train.overrides import DIRECTORIES, ENVIRONMENT
from ssm_train.record import (
    check_peft,
    check_run_directory,
    create_run_directory,
    record_peft,
    recorded_peft,
)
from ssm_train.record.environment import describe_environment, read_driver


def check(path, overwrite=False, resume=False):
    check_run_directory(path, overwrite=overwrite, resume=resume)


def test_a_new_directory_is_free_and_a_used_one_is_not(tmp_path):
    run = tmp_path / "out" / "run"
    check(run)
    assert not run.parent.exists(), "checking writes nothing"
    create_run_directory(run, "name: run\n", overwrite=False)
    with pytest.raises(InputError, match="already holds a run.*--resume.*--overwrite"):
        check(run)
    check(run, overwrite=True)
    check(run, resume=True)
    with pytest.raises(InputError, match="exclude each other"):
        check(run, overwrite=True, resume=True)


def test_resume_without_a_run_may_begin_one(tmp_path):
    check(tmp_path / "nothing", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").touch()
    with pytest.raises(InputError, match="holds files but no run"):
        check(tmp_path / "other", resume=True)


def test_of_two_that_start_together_one_goes_on(tmp_path):
    run = tmp_path / "run"
    check(run)
    check(run)
    create_run_directory(run, "name: first\n", overwrite=False, new=True)
    with pytest.raises(InputError, match="another process has started this run meanwhile"):
        create_run_directory(run, "name: second\n", overwrite=False, new=True)
    assert (run / "cfg.yaml").read_text() == "name: first\n"


def test_a_run_of_the_old_code_is_not_resumed(tmp_path):
    old = "cfg_path: cfg/a.yaml\nis_sdlora: false\noutput_dir: weights/a\nseed: 42\n"
    (tmp_path / "cfg.yaml").write_text(old)
    with pytest.raises(InputError, match="run of another program.*--overwrite to start again"):
        check(tmp_path, resume=True)
    check(tmp_path, overwrite=True)


def test_files_that_are_not_ours_are_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds files but no run"):
        check(tmp_path, overwrite=True)
    link = tmp_path / "link"
    (tmp_path / "real").mkdir()
    create_run_directory(tmp_path / "real", "a: 1\n", overwrite=False)
    link.symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="symbolic link"):
        create_run_directory(link, "a: 2\n", overwrite=True)
    assert (tmp_path / "real" / "cfg.yaml").read_text() == "a: 1\n"


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path):
    run = tmp_path / "run"
    create_run_directory(run, "a: 1\n", overwrite=False)
    (run / "predictions-00000001.jsonl").write_text("{}")
    create_run_directory(run, "a: 2\n", overwrite=True)
    assert sorted(p.name for p in run.iterdir()) == ["cfg.yaml", "environment.json"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check(tmp_path / "run")
    with pytest.raises(InputError, match="cannot write"):
        check(tmp_path / "run" / "below")


def test_the_environment_is_recorded_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted_secret")
    monkeypatch.setenv("HP_LR", "1e-3")
    create_run_directory(tmp_path / "run", "a: 1\n", overwrite=False)
    text = (tmp_path / "run" / "environment.json").read_text()
    assert "hf_planted_secret" not in text
    record = json.loads(text)
    assert record["environment"]["HP_LR"] == "1e-3"
    assert record["packages"]["torch"] and record["cpus"] == os.cpu_count()


def test_every_variable_of_a_run_is_recorded_and_no_other(monkeypatch):
    known = {*ENVIRONMENT, *DIRECTORIES, "WORLD_SIZE"}
    for name in {*known, "SOMETHING_ELSE"}:
        monkeypatch.setenv(name, "1")
    recorded = describe_environment()["environment"]
    assert known <= recorded.keys() and "SOMETHING_ELSE" not in recorded


def test_a_peft_config_that_changed_is_named(tmp_path):
    check_peft(tmp_path, {"r": 8})  # of a run that wrote none down
    began = {"peft_type": "LORA", "r": 4, "rank_pattern": {"q_proj": 2}}
    record_peft(tmp_path, began)
    assert recorded_peft(tmp_path) == began
    check_peft(tmp_path, dict(reversed(began.items())))
    with pytest.raises(InputError, match="r of the PEFT config was 4 .* and is the default now"):
        check_peft(tmp_path, {key: began[key] for key in ("peft_type", "rank_pattern")})
    with pytest.raises(InputError, match="use_dora .* was the default .* and is True now"):
        check_peft(tmp_path, {**began, "use_dora": True})


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159  Release", "580.159"),
        ("something else", None),
    ],
)
def test_the_driver_is_read_from_its_module(line, version, tmp_path):
    file = tmp_path / "version"
    file.write_text(f"{line}\nGCC version:  gcc 12.2.0\n", encoding="utf-8")
    assert read_driver(file) == version
    assert read_driver(tmp_path / "missing") is None
