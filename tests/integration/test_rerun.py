"""`ssm-train rerun`: a run from its record, what is unlike it, and whether its losses are so."""

import json
from pathlib import Path

import pytest
from tiny_runs import LORA, SPARSE, losses, stop_in_step, train, write_config

from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE, FAILED
from ssm_train.record.environment import read_environment

pytestmark = pytest.mark.usefixtures("no_plot")


def run_of(directory: Path, family: str = "mamba", **changes) -> Path:
    return train(write_config(directory, "run", family, **changes)).run_dir


def change_record(run_dir: Path, **values) -> None:
    file = run_dir / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gla", {"peft": LORA}), ("mamba", {"peft": SPARSE}), ("mamba", {"packing": True,
     "batch_size": None, "tokens_per_batch": 64})],
    ids=["gla_lora", "mamba_sd_lora", "mamba_packed"],
)  # fmt: skip
def test_the_same_losses_again_bit_for_bit(family, changes, tmp_path, capsys):
    run_dir = run_of(tmp_path, family, **changes)
    capsys.readouterr()
    assert main(["rerun", str(run_dir), "--losses", "6"]) == DONE
    said = capsys.readouterr().out
    assert said.endswith("the first 6 losses are those of the record, bit for bit\n")
    assert "unlike" not in said
    again = run_dir.with_name("run-rerun")
    in_warmup = 4 if "peft" in changes and changes["peft"] is SPARSE else 0
    assert losses(again) == losses(run_dir)[: len(losses(again))]
    assert 6 - in_warmup <= len(losses(again)) < 8  # it ends soon after them


def test_to_the_end_and_with_a_peft_file_that_has_changed(tmp_path, capsys):
    file = tmp_path / "peft.json"
    file.write_text(json.dumps(LORA))
    run_dir = run_of(tmp_path, peft=str(file), logging_steps=2)
    file.write_text(json.dumps(LORA | {"r": 4}))
    out = tmp_path / "again"
    assert main(["rerun", str(run_dir), "--out", str(out), "--whole"]) == DONE
    assert "the first 4 losses are those of the record, bit for bit" in capsys.readouterr().out
    assert losses(out) == losses(run_dir) and (out / "adapter").is_dir()
    assert main(["rerun", str(run_dir), "--out", str(out)]) == BAD_INPUT
    assert f"--out {out} is there already" in capsys.readouterr().err


def test_other_data_are_said_before_it_starts_and_found_in_the_losses(tmp_path, capsys):
    run_dir = run_of(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(reversed(lines)))
    capsys.readouterr()
    assert main(["rerun", str(run_dir)]) == FAILED
    said = capsys.readouterr().out
    assert said.index(f"unlike {run_dir}: data: ") < said.index("step 1/8")
    assert "\nnot the same: step " in said
    assert said.endswith("they should be the same to 0.0001 of their size\n")


def test_another_version_or_machine_is_said_and_allows_rounding(tmp_path, capsys):
    run_dir = run_of(tmp_path, skip_eval=True)
    packages = json.loads((run_dir / "environment.json").read_text())["packages"]
    change_record(run_dir, packages=packages | {"torch": "1.0"}, cpu="a slide rule")
    file = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for off, code in ((1 + 1e-6, DONE), (1 + 1e-3, FAILED)):
        out = tmp_path / f"out{code}"
        changed = [row | {"loss": row["loss"] * off} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in changed))
        capsys.readouterr()
        assert main(["rerun", str(run_dir), "--out", str(out), "--losses", "3"]) == code
        said = capsys.readouterr().out
        assert f'unlike {run_dir}: cpu: "a slide rule" in the record, ' in said
        assert f'unlike {run_dir}: torch: "1.0" in the record, ' in said
        assert "to 0.0001 of their size" in said
    change_record(run_dir, packages=packages, cpu=read_environment(out)["cpu"])
    exact = tmp_path / "exact"
    assert main(["rerun", str(run_dir), "--out", str(exact), "--losses", "3"]) == FAILED
    assert "they should be the same bit for bit" in capsys.readouterr().out


def test_what_cannot_be_repeated_is_refused(tmp_path, capsys):
    run_dir = run_of(tmp_path, max_steps=1, skip_eval=True)
    change_record(run_dir, processes=4)
    assert main(["rerun", str(run_dir)]) == BAD_INPUT
    assert "trained by 4 processes, and 1 were launched; start with torchrun" in (
        capsys.readouterr().err
    )
    (run_dir / "environment.json").write_text('{"packages"')
    assert main(["rerun", str(run_dir)]) == BAD_INPUT
    assert "environment.json is not what a run wrote" in capsys.readouterr().err
    (run_dir / "environment.json").unlink()
    assert main(["rerun", str(run_dir)]) == BAD_INPUT
    assert "has no environment.json" in capsys.readouterr().err
    assert not run_dir.with_name("run-rerun").exists()


def test_what_was_other_after_a_resume_is_in_the_record_and_said(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, "run", "mamba", peft=LORA)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        run_dir = train(config).run_dir
    assert "resumed" not in read_environment(run_dir)
    change_record(run_dir, threads=1000)
    write_config(tmp_path, "run", "mamba", peft=LORA, max_steps=9)
    train(config, resume=True)
    train(config, resume=True)  # of a run that is done, with nothing changed
    first, second = read_environment(run_dir)["resumed"]
    assert first["step"] == 4 and second == {"step": 9, "changed": []}
    assert first["changed"][0] == "resumed with max_steps 9 instead of 8"
    assert first["changed"][1].startswith("threads: 1000 in the record")
    capsys.readouterr()
    assert main(["rerun", str(run_dir)]) == FAILED  # its schedule has 9 steps from the start
    said = capsys.readouterr().out
    assert "was resumed at step 4 with other values: resumed with max_steps 9 instead" in said
    assert said.count(" was resumed at step ") == 1


def test_a_run_that_was_stopped_resumed_and_overridden(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, "run", "mamba", peft=LORA)
    command = ["train", "--cfg", str(config), "weight_decay=0.1"]
    with monkeypatch.context() as patch:
        for variable, text in {"HP_LR": "3e-3", "HP_SEED": "7", "HP_PEFT_R": "3"}.items():
            patch.setenv(variable, text)
        stop_in_step(patch, 3)
        assert main(command) == 75
        assert main([*command, "--resume"]) == DONE
    monkeypatch.setenv("HP_LR", "9")  # of another day
    run_dir = tmp_path / "output" / "train_seed7" / "run"
    assert main(["rerun", str(run_dir), "--whole"]) == DONE
    assert "the first 8 losses are those of the record, bit for bit" in capsys.readouterr().out
