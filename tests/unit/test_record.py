"""Who may use a run directory, and what is written down about a run."""

import json
import os

import pytest

from ssm_train.errors import InputError
from ssm_train.record import check_run_directory, create_run_directory


def check(path, overwrite=False, resume=False):
    check_run_directory(path, overwrite=overwrite, resume=resume)


def test_a_new_directory_is_free_and_a_used_one_is_not(tmp_path):
    run = tmp_path / "out" / "run"
    check(run)
    assert not run.parent.exists(), "checking writes nothing"
    create_run_directory(run, "model: x\n", overwrite=False)
    with pytest.raises(InputError, match="already holds a run.*--resume.*--overwrite"):
        check(run)
    check(run, overwrite=True)
    check(run, resume=True)
    with pytest.raises(InputError, match="exclude each other"):
        check(run, overwrite=True, resume=True)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        check(tmp_path / "nothing", resume=True)


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
