"""Suites from their scripts to the last line: rounds, failures, interrupts, runs left out. Most
with made-up jobs (made_up_jobs.py), the last ones with real training."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_up_jobs import ROOT, SCRIPTS, Room, processes_with, wait_until

from ssm_train.config import dump_yaml, load_config, run_directory
from ssm_train.launch import rounds
from ssm_train.launch.complete import find_complete_run
from ssm_train.launch.plan import plan_suite
from ssm_train.peft.spec import load_peft
from ssm_train.record import record_peft

TIME = r"\[\d{4}-\d\d-\d\d_\d\d:\d\d:\d\d\]"


@pytest.fixture
def run(
    room: Room, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """run(*words, **variables) -> (exit code, stdout, stderr), in this process, which has torch."""

    def run(*words: str, **variables: str) -> tuple[int, str, str]:
        for name in set(os.environ) - set(room.environment(**variables)):
            monkeypatch.delenv(name)
        for name, value in room.environment(**variables).items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(ROOT)
        capsys.readouterr()
        return rounds.main(words), *capsys.readouterr()

    return run


def is_living(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip() not in ("", "Z", "Zs")


# ---------------------------------------------------------------- the scripts


def test_scripts_can_be_run() -> None:
    names = {"gla_round_new.sh", "gla_tmux_nohup.sh", "gla_batch_tmux.sh"}
    scripts = list(SCRIPTS.glob("*.sh"))
    assert {script.name for script in scripts} == names
    for script in scripts:
        assert os.access(script, os.X_OK), script
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    command = ["shellcheck", *map(str, SCRIPTS.glob("*.sh"))]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""


def test_a_suite_starts_without_torch() -> None:
    modules = ("rounds", "tmux", "batch", "session")
    program = "".join(f"import ssm_train.launch.{module}\n" for module in modules)
    program += "import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_every_line_of_a_round(room: Room) -> None:
    room.write({"E1": ["a", "b.yaml", "c"]})
    done = room.script("gla_round_new.sh", "e1", GPU_IDS="0,1", GPU_PLAN="", FORCE_SEED="7")
    assert done.returncode == 0, done.stderr
    cfg_dir, data = f"{room.path}/yaml", "HP_SEED=7; data=glue-tvt_cola"
    took = r"\d\d:\d\d:\d\d"

    def head(number: int, jobs: int) -> list[str]:
        title = f"Round {number} ({jobs} jobs; FORCE_SEED=7; NUM_GPUS=2; N_SLOTS=2)"
        fixed = [
            f"=== Starting {title} ===",
            "SUITE   = E1",
            f"CFG_DIR = {cfg_dir}",
            f"PEFT_DIR= {room.path}/peft",
            "GPUs    = 0 1",
            "PLAN    = 1 1",
            "SLOTS   = 0 1",
            "DATA    = glue-tvt_cola",
            f"LOGS    = {room.path}/logs",
        ]
        return [*map(re.escape, fixed), rf"{TIME} ROUND={number} START"]

    def tail(number: int) -> list[str]:
        end = rf"{TIME} ROUND={number} END elapsed={took} \(\d+s\)"
        return [end, re.escape(f"ROUND={number} finished (all ran with HP_SEED=7).")]

    expected = [
        *head(1, 2),
        re.escape(f"[GPU 0] a.yaml  ({data})"),
        re.escape(f"[GPU 1] b.yaml  ({data})"),
        *(rf"\[GPU [01]\] [ab]\.yaml  done in {took}" for _ in "ab"),
        *tail(1),
        *head(2, 1),
        re.escape(f"[GPU 0] c.yaml  ({data})"),
        rf"\[GPU 0\] c\.yaml  done in {took}",
        *tail(2),
    ]  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), done.stdout
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_what_a_job_is_given(room: Room, run: Callable[..., tuple[int, str, str]]) -> None:
    room.write({"E1": ["a", "b"]})
    keys = "learning_rate: 5e-4\ntrackers: []\nmin_eval_metric_after_epoch: {3: 0.5}\n"
    (room.path / "yaml" / "a.yaml").write_text(f"model: x\ndata: own  # a comment\n{keys}")
    code, out, _ = run("E1", DATA="glue-tvt_rte", GPU_IDS="4 7", GPU_PLAN="", HP_LR="1e-3")
    assert code == 0, out
    assert room.seen("a") == {
        "model": "x",
        "data": "glue-tvt_rte",
        "learning_rate": 5e-4,
        "trackers": [],
        "min_eval_metric_after_epoch": {3: 0.5},
    }
    program, flag, copy, last = room.arguments("a")
    assert (program, flag, Path(copy).name, last) == ("train.py", "--cfg", "a.yaml", "--overwrite")
    assert not Path(copy).exists() and not list((room.path / "tmp").iterdir())
    a, b = room.variables("a"), room.variables("b")
    assert (a["CUDA_VISIBLE_DEVICES"], b["CUDA_VISIBLE_DEVICES"]) == ("4", "7")
    assert (a["HP_SEED"], a["HP_LR"], a["PWD"]) == ("87", "1e-3", str(ROOT))
    assert (room.path / "logs" / "a.log").read_text() == "this is a\n"


def test_a_job_on_the_cpu_sees_no_gpu(room: Room, run: Callable[..., tuple[int, str, str]]) -> None:
    room.write({"E1": ["a"]})
    _, out, _ = run("E1", GPU_PLAN="1", DATA="")
    assert room.variables("a")["CUDA_VISIBLE_DEVICES"] == ""
    assert "[CPU] a.yaml  (HP_SEED=87; data=own_a)" in out
    assert "NUM_GPUS=0; N_SLOTS=1" in out and "SLOTS   = CPU" in out
    assert room.seen("a")["data"] == "own_a"


# ---------------------------------------------------------------- which configs, which rounds

FIVE = {"E1": ["a", "b", "c", "d", "e"]}


@pytest.mark.parametrize(
    ("words", "order"),
    [
        (["E1"], ["a", "b", "c", "d", "e"]),
        (["E1", "all"], ["a", "b", "c", "d", "e"]),
        (["E1", "2"], ["c", "d"]),
        (["E1", "3", "1", "3"], ["e", "a", "b"]),
        ([], ["a", "b"]),
        (["4"], ["x"]),
        (["all"], ["a", "b", "c", "d", "e", "f", "x"]),
    ],
    ids=" ".join,
)
def test_which_jobs_a_command_runs(
    room: Room, run: Callable[..., tuple[int, str, str]], words: list[str], order: list[str]
) -> None:
    room.write({**FIVE, "E2": ["f", "x"]})
    code, out, _ = run(*words)
    assert code == 0
    assert f"SUITE   = {'E1' if 'E1' in words else 'ALL'}" in out
    started = re.findall(r"^\[CPU\] (\w+)\.yaml  \(HP_SEED", out, re.M)
    assert started == order
    assert sorted(room.order()) == sorted(order)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["E1", "x"], "Invalid round 'x'. Valid values: 1 2 3 or 'all'.\n"),
        (["E1", "4", "1"], "Invalid round '4'. Valid values: 1 2 3 or 'all'.\n"),
        (["F1"], "Invalid round 'F1'. Valid values: 1 2 3 or 'all'.\n"),
        (["E1", "0"], "Invalid round '0'. Valid values: 1 2 3 or 'all'.\n"),
        (["E11"], "it has E1 E2; did you mean 'E1'?\n"),
        (["E2"], "is empty; others are E1\n"),
        (["E1", "--skip-don"], "did you mean '--skip-done'?\n"),
    ],
    ids=str,
)
def test_a_wrong_command_starts_nothing(
    room: Room, run: Callable[..., tuple[int, str, str]], words: list[str], said: str
) -> None:
    room.write({**FIVE, "E2": []})
    code, out, error = run(*words)
    assert (code, out) == (1, "")
    assert error.endswith(said) and error.count("\n") == 1
    assert not room.order()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FORCE_SEED": "x"}, "FORCE_SEED: 'x'"),
        ({"PYTHON": "no/such/python"}, "PYTHON: 'no/such/python'"),
        ({"GPU_PLAN": "1 1"}, "GPU_PLAN: 2 numbers"),
        ({"EXP_ROOT": "no/such"}, "no/such/suites.yaml"),
        ({"STOP_GRACE": "soon"}, "STOP_GRACE: 'soon'"),
        ({"DATA": "glue-tvt_rte", "HP_DATA": "cola"}, "HP_DATA=cola would win over DATA=glue-tvt"),
    ],
    ids=str,
)
def test_a_wrong_variable_starts_nothing(
    room: Room, run: Callable[..., tuple[int, str, str]], variables: dict[str, str], said: str
) -> None:
    room.write(FIVE)
    code, out, error = run("E1", **variables)
    assert (code, out) == (1, "")
    assert said in error and error.count("\n") == 1


def test_missing_configs_are_named_at_once(
    room: Room, run: Callable[..., tuple[int, str, str]]
) -> None:
    room.write(FIVE)
    for name in ("b", "e"):
        (room.path / "yaml" / f"{name}.yaml").unlink()
    code, out, error = run("E1", "all")
    cfg_dir = room.path / "yaml"
    assert (code, out) == (1, "")
    assert error.splitlines() == [
        f"Missing configs (expected under {cfg_dir}):",
        f"  {cfg_dir}/b.yaml",
        f"  {cfg_dir}/e.yaml",
    ]
    assert run("E1", "2")[0] == 0, "a round with all its configs runs"


def test_a_config_that_is_not_yaml_starts_nothing(
    room: Room, run: Callable[..., tuple[int, str, str]]
) -> None:
    room.write(FIVE)
    (room.path / "yaml" / "e.yaml").write_text("data: [")
    code, _, error = run("E1", "all")
    assert code == 1 and "e.yaml" in error
    assert not room.order() and not list((room.path / "tmp").iterdir())


def test_a_repeated_config_runs_once(room: Room, run: Callable[..., tuple[int, str, str]]) -> None:
    room.write({"E1": ["a", "b", "a.yaml"]})
    code, out, _ = run("E1")
    assert code == 0
    assert "a.yaml stands more than once in suite E1; it runs once" in out
    assert sorted(room.order()) == ["a", "b"]


def test_two_configs_for_one_run_directory_are_refused(
    room: Room, run: Callable[..., tuple[int, str, str]]
) -> None:
    room.write({"E1": ["a.yaml", "a.yml"]})
    code, _, error = run("E1")
    assert code == 1 and "a.yaml and a.yml" in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("first: [a]", "'first' is not a suite's name"),
        ("E1: a", "is not a list of config names"),
        ("E1: [1]", "is not a list of config names"),
        ("E1: [a]\ne1: [b]", "stands twice"),
        ("", "suite E1 is not in"),
    ],
)
def test_a_wrong_list_is_named(
    room: Room, run: Callable[..., tuple[int, str, str]], text: str, said: str
) -> None:
    room.write(FIVE)
    (room.path / "suites.yaml").write_text(text)
    code, _, error = run("E1")
    assert code == 1 and "suites.yaml" in error and said in error


def test_a_path_as_data_names_the_logs_by_its_stem(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    room.write(FIVE)
    environment = room.environment(LOG_DIR="", DATA="some/where/my data.jsonl")
    assert plan_suite(["E1"], environment).log_dir == Path("logs/E1_my_data_s87")


# ---------------------------------------------------------------- failures

WAIT_FOR = "for i in {{1..600}}; do [[ -f $room/{0}.arguments ]] && break; sleep 0.05; done"


def test_jobs_of_a_round_run_side_by_side(
    room: Room, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Each waits until the other has begun, and fails if it never does."""
    wait = WAIT_FOR + "; [[ -f $room/{0}.arguments ]]"
    room.write({"E1": ["a", "b"]}, a=wait.format("b"), b=wait.format("a"))
    assert run("E1")[0] == 0


def test_a_failed_job_ends_the_suite_after_its_round(
    room: Room, run: Callable[..., tuple[int, str, str]]
) -> None:
    loud = "for i in {1..30}; do echo line $i; done; exit 3"
    room.write(FIVE, c=loud, d=WAIT_FOR.format("c") + "; sleep 0.3; echo late >$room/d.ended")
    code, out, _ = run("E1")
    assert code == 1
    assert sorted(room.order()) == ["a", "b", "c", "d"]
    assert (room.path / "d.ended").exists(), "the other job of the round runs to its end"
    assert re.search(r"^\[CPU\] c\.yaml  FAILED \(exit 3\) in \d\d:\d\d:\d\d$", out, re.M)
    log = out[out.index(f"  the end of {room.path}/logs/c.log:") :]
    assert "    line 30\n" in log and "    line 11\n" in log and "line 10\n" not in log
    assert re.search(rf"^{TIME} ROUND=2 END", out, re.M)
    assert "ROUND=1 finished" in out and "ROUND=2 finished" not in out
    assert out.endswith("SUMMARY:\n  Experiments completed: 1.\n  Experiment 2 failed. Stopping.\n")


def test_a_suite_that_fails_at_once_has_completed_none(
    room: Room, run: Callable[..., tuple[int, str, str]]
) -> None:
    room.write(FIVE, b="exit 75", a="kill -KILL $$")
    code, out, _ = run("E1", "1", "2")
    assert code == 1
    assert "b.yaml  FAILED (exit 75: it was asked to stop, saved itself, and wants to" in out
    assert "a.yaml  FAILED (signal 9: Killed) in" in out
    assert "Experiments completed: none.\n  Experiment 1 failed. Stopping." in out


def test_what_a_job_leaves_behind_is_ended_with_its_round(
    room: Room, run: Callable[..., tuple[int, str, str]]
) -> None:
    room.write({"E1": ["a"]}, a="sleep 1000 & echo $! >$room/left")
    assert run("E1", STOP_GRACE="0.2")[0] == 0
    assert not is_living(int((room.path / "left").read_text()))


# ---------------------------------------------------------------- interrupts

OBEDIENT = "trap 'sleep 0.2; exit 75' INT; echo >$room/ready; while :; do sleep 0.05; done"
DEAF = "trap '' INT TERM; sleep 1000 & echo $! >$room/child; while :; do sleep 0.05; done"


@pytest.fixture
def hangup_heard() -> Iterator[None]:
    """Tests under nohup would hand down an ignored SIGHUP, which a suite keeps ignoring."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@pytest.mark.usefixtures("hangup_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_stops_every_process(room: Room, number: signal.Signals) -> None:
    room.write(FIVE, c=OBEDIENT, d=DEAF)
    child, ready = room.path / "child", room.path / "ready"
    with room.started("E1", STOP_GRACE="1") as suite:
        wait_until(lambda: child.exists() and child.read_text().strip() and ready.exists())
        assert len(processes_with(str(room.path))) >= 2
        suite.send_signal(number)
        out, _ = suite.communicate(timeout=60)
    assert suite.returncode == 130, out
    assert re.search(r"c\.yaml  stopped \(exit 75\) in", out)
    assert re.search(r"d\.yaml  stopped \(signal 9: Killed\) in", out)
    assert out.endswith(
        "SUMMARY:\n  Experiments completed: 1.\n  Experiment 2 exited abnormally (interrupted).\n"
    )
    assert not processes_with(str(room.path))
    assert not is_living(int(child.read_text()))
    assert not list((room.path / "tmp").iterdir())
    assert "e" not in room.order()


def test_a_suite_under_nohup_survives_its_terminal(
    room: Room, run: Callable[..., tuple[int, str, str]]
) -> None:
    room.write({"E1": ["a"]}, a="kill -HUP $PPID; sleep 0.3")
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert run("E1")[0] == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


# ---------------------------------------------------------------- runs left out


def write_complete_run(room: Room, name: str, outcome: str = "finished") -> Path:
    """What a complete run with the suite's data and seed leaves."""
    config = room.path / "yaml" / f"{name}.yaml"
    changes = {"data": "glue-tvt_cola", "seed": "87"}
    cfg, _ = load_config(config, changes, {"SSM_TRAIN_OUTPUT": str(room.path / "output")})
    run_dir = run_directory(cfg, config)
    run_dir.mkdir(parents=True)
    (run_dir / "cfg.yaml").write_text(dump_yaml(cfg))
    (run_dir / "result.json").write_text(json.dumps({"outcome": outcome}))
    return run_dir


def test_complete_runs_are_left_out_when_asked(
    room: Room, run: Callable[..., tuple[int, str, str]]
) -> None:
    room.write(FIVE)
    output = {"SSM_TRAIN_OUTPUT": str(room.path / "output")}
    done = write_complete_run(room, "a")
    write_complete_run(room, "c", "stopped")
    code, out, _ = run("--skip-done", "E1", "1", "2", **output, GPU_PLAN="3")
    assert sorted(room.order()) == ["b", "c", "d", "e"]
    assert f"[CPU] a.yaml  skipped: {done} is complete" in out
    assert "[CPU] c.yaml  runs: " in out and "outcome: stopped" in out
    assert "=== Starting Round 1 (2 jobs;" in out


def test_an_earlier_run_is_no_result_of_a_job_that_failed(
    room: Room, run: Callable[..., tuple[int, str, str]]
) -> None:
    room.write({"E1": ["a", "b"]}, a="exit 2")
    run_dir = write_complete_run(room, "a")
    os.utime(run_dir / "cfg.yaml", (2**32, 2**32))  # no clock is asked
    code, out, _ = run("E1", SSM_TRAIN_OUTPUT=str(room.path / "output"))
    assert code == 1 and "table" not in out
    assert not (room.path / "logs" / "report.txt").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"HP_SEED": "88"}, "no run in"),
        ({"HP_LR": "1e-3"}, "differs in learning_rate"),
        ({"HP_PEFT_R": "3"}, "differs in peft_overrides"),
        ({"HP_EPOCHS": "many"}, "num_epochs"),
    ],
)
def test_only_a_run_of_the_same_config_counts(
    room: Room, change: dict[str, str], reason: str
) -> None:
    from tiny_runs import LORA

    room.write({"E1": ["a"]})
    config, peft = room.path / "yaml" / "a.yaml", room.path / "lora.json"
    config.write_text(f"model: x\ndata: glue-tvt_cola\npeft: {peft}\n")
    peft.write_text(json.dumps(LORA))
    run_dir = write_complete_run(room, "a")
    record_peft(run_dir, load_peft(str(peft), {}).dump())
    os.utime(peft, (2**32, 2**32))
    environment = {"SSM_TRAIN_OUTPUT": str(room.path / "output"), "HP_SEED": "87", **change}
    found, said = find_complete_run(config, environment)
    assert found == (None if change else run_dir)
    assert reason in said
    if not change:
        peft.write_text(json.dumps(LORA | {"r": 4}))
        os.utime(peft, (0, 0))
        assert "other PEFT settings" in find_complete_run(config, environment)[1]
        peft.write_text(json.dumps(LORA))
        (run_dir / "result.json").write_text("{")
        assert "outcome: None" in find_complete_run(config, environment)[1]


def test_auto_is_the_run_of_any_number(room: Room) -> None:
    """Which number is the GPU's affair, of the day on which the run began."""
    room.write({"E1": ["a"]})
    config = room.path / "yaml" / "a.yaml"
    text = "model: x\ndata: glue-tvt_cola\npacking: true\ntokens_per_batch: {}\n"
    config.write_text(text.format(24_576))
    run_dir = write_complete_run(room, "a")
    environment = {"SSM_TRAIN_OUTPUT": str(room.path / "output"), "HP_SEED": "87"}
    for tokens, found in {"auto": run_dir, "24576": run_dir, "8192": None}.items():
        config.write_text(text.format(tokens))
        assert find_complete_run(config, environment)[0] == found


# ---------------------------------------------------------------- real training


def write_real_suite(room: Room, names: list[str], **changes: object) -> None:
    """Tiny Mambas on a few sentences, in suite E1; their data is in `room.path/yaml`."""
    from tiny_runs import LORA, write_config

    room.write({"E1": names})
    for name in names:
        write_config(
            room.path / "yaml", name, "mamba",
            **{"val_data": None, "peft": LORA, "max_steps": 4, "eval_steps": None, **changes},
        )  # fmt: skip


@pytest.mark.parametrize("script", ["gla_round_new.sh", "gla_tmux_nohup.sh", "gla_batch_tmux.sh"])
def test_a_python_without_torch_is_one_line(room: Room, script: str) -> None:
    bare = room.path / "bare"
    bare.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -S "$@"\n')  # nothing installed
    bare.chmod(0o755)
    refused = room.script(script, "E1", PYTHON=str(bare))
    assert refused.returncode == 1 and not refused.stdout
    assert refused.stderr == (
        f"{bare} has no torch; make .venv with make quickstart, or set PYTHON to what has it\n"
    )


def real(room: Room, **variables: str) -> dict[str, str]:
    data, python = str(room.path / "yaml"), sys.executable
    return {"DATA": data, "PYTHON": python, "FORCE_SEED": "11", **variables}


@pytest.mark.slow
def test_a_suite_of_real_runs_fails_is_mended_and_goes_on(room: Room) -> None:
    write_real_suite(room, ["good", "bad", "last"])
    bad, runs = room.path / "yaml" / "bad.yaml", room.path / "yaml" / "output" / "yaml_seed11"
    right = bad.read_text()
    bad.write_text(right.replace("max_steps", "max_step"))
    failed = room.script("gla_round_new.sh", "E1", "all", **real(room))
    assert failed.returncode == 1, failed.stdout
    assert "    error: " in failed.stdout and "max_steps" in failed.stdout  # the log's end
    assert "Experiment 1 failed. Stopping." in failed.stdout
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == ["good"]
    cfg, _ = load_config(runs / "good" / "cfg.yaml")
    assert (cfg.data, cfg.seed, cfg.val_data, cfg.max_steps) == (
        str(room.path / "yaml"), 11, None, 4,
    )  # fmt: skip
    table = (room.path / "logs" / "report.txt").read_text()
    assert "good" in table and "bad" not in table

    bad.write_text(right)
    done = room.script("gla_round_new.sh", "E1", "1", "--skip-done", **real(room))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"good.yaml  skipped: {runs}/good is complete" in done.stdout
    assert "ROUND=1 finished (all ran with HP_SEED=11)." in done.stdout
    table = (room.path / "logs" / "report.txt").read_text()
    assert table.strip() in done.stdout
    for name in ("good", "bad"):
        assert (runs / name / "adapter" / "adapter_config.json").is_file()
        assert name in table
    assert not list((room.path / "tmp").iterdir())


@pytest.mark.slow
def test_an_interrupt_lets_real_runs_save_themselves(room: Room) -> None:
    write_real_suite(room, ["one", "two"], max_steps=10**6, save_steps=10**6, skip_eval=True)
    logs = [room.path / "logs" / f"{name}.log" for name in ("one", "two")]
    with room.started("E1", **real(room)) as suite:
        wait_until(lambda: all(log.exists() and "step 1/" in log.read_text() for log in logs))
        assert len(processes_with(str(room.path / "tmp"))) >= 2
        suite.send_signal(signal.SIGINT)
        out, _ = suite.communicate(timeout=60)
    assert suite.returncode == 130, out
    assert out.count("stopped (exit 75)") == 2
    assert out.endswith(
        "SUMMARY:\n  Experiments completed: none.\n"
        "  Experiment 1 exited abnormally (interrupted).\n"
    )
    for name in ("one", "two"):
        run_dir = room.path / "yaml" / "output" / "yaml_seed11" / name
        assert (run_dir / "checkpoints" / "last").is_file()
    assert not processes_with(str(room.path))
    assert not list((room.path / "tmp").iterdir())


@pytest.mark.slow
def test_a_second_suite_does_not_touch_the_runs_of_the_first(room: Room) -> None:
    write_real_suite(room, ["one"], max_steps=10**6, save_steps=10**6, skip_eval=True)
    log = room.path / "logs" / "one.log"
    with room.started("E1", **real(room)) as suite:
        wait_until(lambda: log.exists() and "step 1/" in log.read_text())
        with room.started("E1", **real(room, LOG_DIR=str(room.path / "other"))) as second:
            said, _ = second.communicate(timeout=120)
        assert second.returncode == 1, said
        assert "FAILED (exit 2)" in said and "error: lock: process " in said
        assert suite.poll() is None
        suite.send_signal(signal.SIGINT)
        out, _ = suite.communicate(timeout=60)
    assert out.count("stopped (exit 75)") == 1, out
