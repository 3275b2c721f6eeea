"""Job scripts for Slurm, as far as they can be judged without one: their text, `ssm-train slurm`,
the lines of a sweep. tests/slurm submits them."""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_jobs import ROOT, Room

from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE
from ssm_train.launch import slurm_node, slurm_sweep

SHIPPED = sorted((ROOT / "slurm").glob("*_*.sh"))
CFG = "cfg/quickstart/gla_lora.yaml"
FLAGS = f"slurm --cfg {CFG} --nodes 2 --gpus-per-node 8 --time 24:00:00 --engine zero2".split()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A script that the command wrote."""
    out = tmp_path / "my job.sh"
    assert main([*FLAGS, "--partition", "gpu", "--sbatch=--mem=200G", "--out", str(out)]) == DONE
    return out


def header(script: Path) -> dict[str, str]:
    """The options of its #SBATCH lines."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.M)
    return dict(found)


def test_bash_and_shellcheck_have_nothing_to_say(written: Path) -> None:
    assert len(SHIPPED) == 3
    body = ROOT / "ssm_train" / "launch" / "slurm_job.sh"
    scripts = [*SHIPPED, ROOT / "slurm" / "env.sh", body, written]
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert (script in (*SHIPPED, written)) == os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
        assert done.stdout == ""


def test_the_command_writes_what_the_shipped_scripts_say(written: Path) -> None:
    """So that there is one way in which jobs save themselves and go on."""
    ours = header(written)
    assert ours.pop("partition") == "gpu" and ours.pop("mem") == "200G"
    assert ours.pop("job-name") == "gla_lora"
    shipped = header(ROOT / "slurm" / "train_multi_node.sh")
    assert shipped.pop("job-name") == "ssm_train"
    assert ours == shipped
    for script in SHIPPED:
        kept = {key: header(script)[key] for key in ("signal", "requeue", "open-mode")}
        assert kept == {key: shipped[key] for key in kept}
    last = written.read_text().splitlines()[-1]
    assert last == f'train_on_nodes accelerate_configs/many_nodes/zero2_fp32.yaml {CFG} "$@"'


WRONG = {
    "--time 90": "is not HH:MM:SS",
    "--time 00:00:30": "less than a minute",
    "--engine zero": "did you mean 'zero3' or 'zero2' or 'zero1'",
    "--engine my.yaml": "my.yaml does not exist",
    "--nodes 0": "not a whole number of at least 1",
    "--sbatch=--mem=1G;reboot": "is not one option of sbatch",
    "--sbatch=mem": "is not one option of sbatch",
    "--out pyproject.toml": "exists already",
    "--out nowhere/job.sh": "No such file or directory",
    "--cfg none.yaml": "none.yaml",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_flags_write_nothing(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "job.sh"
    assert main([*FLAGS, "--out", str(out), *words.split()]) == BAD_INPUT
    assert WRONG[words] in capsys.readouterr().err
    assert not out.exists()


def test_a_short_job_is_told_in_time(tmp_path: Path) -> None:
    out = tmp_path / "job.sh"
    assert main([*FLAGS, "--out", str(out), "--time", "00:10:00"]) == DONE
    assert header(out)["signal"] == "B:USR1@60"


def test_without_a_terminal_what_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main(["slurm", "--cfg", CFG, "--gpus-per-node", "8"]) == BAD_INPUT
    assert "error: give --nodes, --time;" in capsys.readouterr().err


def test_a_terminal_is_asked_for_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "job.sh"
    words = [sys.executable, "-m", "ssm_train", "slurm", "--cfg", CFG, "--out", str(out)]
    ours, theirs = pty.openpty()
    asked = subprocess.Popen(words, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    os.close(theirs)
    os.write(ours, b"two\n1\n1\n02:00:00\n")
    said = asked.communicate()[0].decode()
    os.close(ours)
    assert asked.returncode == DONE, said
    assert "'two' is not a whole number" in said and said.count("nodes: ") == 2
    assert f"submit it with: sbatch {shlex.quote(str(out))}" in said
    assert (header(out)["nodes"], header(out)["time"]) == ("1", "02:00:00")
    assert "one_node/single_fp32.yaml" in out.read_text()


def test_a_sweep_has_a_line_a_run(
    room: Room, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room.write({"E1": ["a", "b", "a"], "E2": ["c"]})
    for name, value in room.environment(DATA="my data/x.jsonl", FORCE_SEED="7").items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert slurm_sweep.main(["E1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [[f"{room.path}/yaml/{n}.yaml", "seed=7", "data=my data/x.jsonl"] for n in "ab"]
    assert [shlex.split(line) for line in lines] == expected
    assert slurm_sweep.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert slurm_sweep.main(["E3"]) == 2
    assert "suite E3 is not in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "code", "says"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(75)", 75, "rank 0 saved itself and wants to be started again"),
        ("import sys; sys.exit(2)", 2, "rank 0 ended with exit code 2"),
        ("import os; os.kill(os.getpid(), 9)", 137, "rank 0 was killed by SIGKILL"),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_node_ends_as_its_run_did(
    program: str, code: int, says: str, processes: int, tmp_path: Path, free_port: int
) -> None:
    (tmp_path / "run.py").write_text(
        f"import os\nif os.environ.get('RANK', '0') == '0':\n  {program}"
    )
    config = f"one_node/{'single' if processes == 1 else 'ddp'}_fp32.yaml"
    words = (
        f"accelerate launch --config_file accelerate_configs/{config} --num_processes {processes}"
    )
    words += f" --main_process_port {free_port} {tmp_path}/run.py"
    done = subprocess.run(
        [sys.executable, "-m", "ssm_train.launch.slurm_node", *words.split()],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "SLURMD_NODENAME": "n7"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert (f"node n7: {says}\n" in done.stderr) == bool(says)


def test_a_rank_that_broke_is_named_before_one_that_saved_itself() -> None:
    assert slurm_node.choose_failure({0: 75, 1: -signal.SIGKILL}) == (1, -9)
    assert slurm_node.choose_failure({2: 75, 1: 75}) == (1, 75)
