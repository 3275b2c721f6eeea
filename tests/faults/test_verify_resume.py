"""`ssm-train verify-resume`: honest runs pass, whatever was changed between two parts is named."""

from collections.abc import Callable
from pathlib import Path

import pytest
from kills import change_numpy_state, newest, sign
from safetensors.torch import load_file, save_file
from starts import start
from tiny_runs import LORA, SPARSE, write_config

from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE, FAILED
from ssm_train.config import load_config
from ssm_train.errors import InputError
from ssm_train.verify_resume import verify

CASES = {
    "gla_lora": ("gla", {"peft": LORA}),
    "mamba_full": ("mamba", {"gradient_accumulation_steps": 2}),
    "gla_packed": ("gla", {"peft": LORA, "packing": True, "batch_size": None,
                           "tokens_per_batch": 64}),
    "mamba_sd_lora": ("mamba", {"peft": SPARSE | {"proj_lora_dropout": 0.1}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_killed_twice_is_the_same(case, tmp_path, capsys):
    family, changes = CASES[case]
    config = write_config(tmp_path, case, family, eval_at_start=True, **changes)
    before = sorted(tmp_path.iterdir())
    assert main(["verify-resume", "--cfg", str(config)]) == DONE
    said = capsys.readouterr().out
    assert "step 6 reached in one go" in said and "the same, bit for bit" in said
    stops = "step 2 of the warm-up and step 2 and step 4" if "sd" in case else "step 2 and step 4"
    assert f"killed after {stops} and resumed" in said
    assert sorted(tmp_path.iterdir()) == before  # nothing in output_root


def other_weight(run_dir: Path) -> None:
    file = newest(run_dir) / "trainable.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] += 1e-6
    save_file(tensors, file)
    sign(file.parent)


def other_order(run_dir: Path) -> None:
    for file in (run_dir / "cfg.yaml", run_dir.parents[1] / "run.yaml"):
        file.write_text(file.read_text().replace("group_by_length: true", "group_by_length: false"))


def other_data(run_dir: Path) -> None:
    data = Path(load_config(run_dir / "cfg.yaml")[0].data)
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(reversed(lines)))


def lost_moments(run_dir: Path) -> None:
    file = newest(run_dir) / "optimizer.safetensors"
    tensors = load_file(file)
    save_file({name: t * 0 if "exp_avg_sq" in name else t for name, t in tensors.items()}, file)
    sign(file.parent)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_numpy_state, "checkpoint of step 1: random state: NumPy's differs"),
        (other_weight, "checkpoint of step 1: parameter "),
        (lost_moments, "checkpoint of step 1: optimizer state "),
        (other_order, "step 2: examples ["),
    ],
)
def test_what_a_resumed_run_does_otherwise_is_named(
    change: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    cfg, _ = load_config(write_config(tmp_path, "run", "mamba", peft=LORA))
    once = iter([change])
    difference = verify(cfg, 3, lambda line: None, lambda run: next(once, lambda run: None)(run))
    assert difference is not None and difference.startswith(named), difference
    assert "before the first stop" not in difference


def test_other_data_are_refused_by_the_resumed_run(tmp_path: Path) -> None:
    cfg, _ = load_config(write_config(tmp_path, "run", "mamba", peft=LORA))
    with pytest.raises(InputError, match="--resume: the training data were .* are others now"):
        verify(cfg, 3, lambda line: None, other_data)


def test_two_processes_that_are_killed_twice_are_the_same(tmp_path: Path) -> None:
    config = write_config(tmp_path, "run", "mamba", peft=SPARSE, batch_size=2)
    done = start(2, "-m", "ssm_train", "verify-resume", "--cfg", config)
    assert done.returncode == DONE, done.stderr
    assert "killed after step 2 of the warm-up and step 2 and step 4 and resumed" in done.stdout
    assert done.stdout.count("the same, bit for bit") == 1


def test_what_differs_on_another_rank_is_named(tmp_path: Path) -> None:
    config = write_config(tmp_path, "run", "gla", peft=LORA, batch_size=2)
    done = start(2, Path(__file__).with_name("changed_run.py"), config)
    assert done.returncode == DONE, done.stderr
    assert done.stdout.count("checkpoint of step 1: random state: NumPy's differs on rank 1") == 2


def test_the_command_fails_where_runs_differ(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path, "run", "mamba")
    monkeypatch.setattr("ssm_train.verify_resume.verify", lambda *given: "step 3: loss 1.0 ...")
    assert main(["verify-resume", "--cfg", str(config)]) == FAILED
    assert capsys.readouterr().out == "not the same: step 3: loss 1.0 ...\n"


def test_a_shorter_run_is_stopped_earlier_and_a_broken_one_is_said(tmp_path, capsys):
    short = write_config(tmp_path, "short", "mamba", max_steps=4)
    assert main(["verify-resume", "--cfg", str(short), "--steps", "30"]) == DONE
    assert "step 3 reached again, killed after step 1 and step 2" in capsys.readouterr().out
    tiny = write_config(tmp_path, "tiny", "mamba", max_steps=2)
    with pytest.raises(InputError, match="the run has 2 steps, which cannot be stopped twice"):
        verify(load_config(tiny)[0], 6, lambda line: None)
    broken = write_config(tmp_path, "broken", "mamba", data=str(tmp_path / "none.jsonl"))
    assert main(["verify-resume", "--cfg", str(broken)]) == BAD_INPUT
    assert "none.jsonl" in capsys.readouterr().err
