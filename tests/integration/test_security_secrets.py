"""No token or password gets into a file of a run, onto the terminal, or into a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import train, write_config

from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE
from ssm_train.secrets import HIDDEN, redact, redact_command

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
HUB_TOKEN = f"hf_{ALPHABET[:34]}"
PLANTED = {
    "HF_TOKEN": HUB_TOKEN,
    "HUGGING_FACE_HUB_TOKEN": HUB_TOKEN.upper(),
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIxK7MDENGxbPxRfiCYEXAMPLEKEY",
    "HP_API_KEY": "planted-in-a-variable-that-looks-like-ours",
    "HP_TOKEN": "planted-in-another",
    "SSM_TRAIN_TOKEN": "planted-in-a-third",
    "ACCELERATE_SECRET": "planted-in-a-fourth",
}
TINY = {"peft": {"peft_type": "LORA", "r": 1}, "max_steps": 2, "save_steps": 1, "eval_steps": 2}
TRACEBACK = """
import sys
from ssm_train.cli import main
from ssm_train.record.runlog import RunLog
def fail(*_): raise RuntimeError("provoked")
if sys.argv.pop(1) == "fail":
    RunLog.trained = fail
sys.exit(main())
"""


def held(text: str | bytes) -> list[str]:
    content = text.encode() if isinstance(text, str) else text
    return [name for name, secret in PLANTED.items() if secret.encode() in content]


def search(directory: Path) -> dict[str, list[str]]:
    """File -> the planted secrets in it."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    return {str(path): found for path in files if (found := held(path.read_bytes()))}


@pytest.mark.parametrize("kind", ["finish", "fail"])
def test_secrets_of_the_environment_stay_there(kind: str, tmp_path: Path) -> None:
    """A whole run with its trackers in a process of its own, and one that ends in a traceback."""
    config = write_config(tmp_path, "tiny", "mamba", **TINY, trackers=["tensorboard"])
    ran = subprocess.run(
        [sys.executable, "-c", TRACEBACK, kind, "train", "--cfg", str(config)],
        env=os.environ | PLANTED, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == (DONE if kind == "finish" else 1), ran.stderr
    assert ("RuntimeError: provoked" in ran.stderr) == (kind == "fail")
    run_dir = tmp_path / "output/train_seed42/tiny"
    assert (run_dir / "tensorboard").is_dir() and (run_dir / "environment.json").is_file()
    assert not search(tmp_path)
    assert not held(ran.stdout + ran.stderr)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["model=https://somebody:correct-horse@host/model"], "model"),
        ([f"tokenizer={HUB_TOKEN}"], "tokenizer"),
        ([f"learning_rate={HUB_TOKEN}"], "learning_rate"),  # its message would show the value
        ([f"data=https://host/data?token={ALPHABET}"], "data"),
        ([f"new_model.name=[a, {{b: {HUB_TOKEN}}}]"], "new_model.name"),
        ([f"data.{HUB_TOKEN}=1"], "a key"),
        ([f"--model={HUB_TOKEN}"], "model"),
        ([HUB_TOKEN], ""),
        ([f"--{HUB_TOKEN}"], ""),
    ],
)
def test_a_secret_on_the_command_line_is_refused_and_not_said(
    words: list[str], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, "tiny", "mamba", **TINY)
    assert main(["train", "--cfg", str(config), *words]) == BAD_INPUT
    said = "".join(capsys.readouterr())
    assert key in said and not held(said)
    assert ALPHABET[:20] not in said and "correct-horse" not in said
    assert not (tmp_path / "output").exists()


def test_a_secret_in_a_config_file_or_a_variable_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, "tiny", "mamba", **TINY, revision=HUB_TOKEN)
    assert main(["train", "--cfg", str(config)]) == BAD_INPUT
    said = capsys.readouterr().err
    assert f"{config}: revision holds what looks like a token" in said and not held(said)
    config = write_config(tmp_path, "tiny", "mamba", **TINY)
    monkeypatch.setenv("HP_DATA", f"https://me:{ALPHABET}@host/data")
    assert main(["train", "--cfg", str(config)]) == BAD_INPUT
    said = capsys.readouterr().err
    assert "HP_DATA holds what looks like a token" in said and ALPHABET not in said


def test_a_script_s_own_command_line_is_recorded_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["mine.py", "--hf-token", "short1", "--api-key=short2", f"url=x?token={ALPHABET}", "ok"]
    monkeypatch.setattr("sys.argv", [*words, HUB_TOKEN])
    run_dir = train(write_config(tmp_path, "tiny", "mamba", **TINY)).run_dir
    record = (run_dir / "environment.json").read_text()
    assert '"mine.py"' in record and '"ok"' in record and record.count(HIDDEN) == 4
    assert not search(tmp_path) and "short" not in record and ALPHABET not in record


def test_what_is_no_secret_stays() -> None:
    words = [
        *("tokens_per_batch=65536", "--tokenizer", "EleutherAI/gpt-neox-20b", "seed=1"),
        *("model=hf_models/a_very_long_name_of_a_directory_with_words", "https://host/a?b=c"),
        *("task.prompt={question} token: {answer}", "0123456789abcdef0123456789abcdef01234567"),
        *("ghost_writers_and_their_many_readers", "sk-learn-and-other-words-of-this-kind"),
    ]
    assert redact_command(words) == words
    assert redact("hf_" + "a" * 34) == HIDDEN
