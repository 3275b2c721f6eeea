"""Sessions and batches in a real tmux, on a server of the test's own."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_up_jobs import ROOT, SCRIPTS, Room, processes_with, wait_until

from ssm_train.launch.tmux import parse_arguments, plan_session

TIME = r"\[\d{4}-\d\d-\d\d_\d\d:\d\d:\d\d\]"
WAIT = "trap 'exit 75' INT; echo >$room/begun; while :; do sleep 0.05; done"
needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


@pytest.fixture
def server(room: Room, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables that lead to a tmux server without anybody's settings, ended after the test."""
    sockets = tmp_path_factory.mktemp("tmux")  # a short path: sockets have short names
    variables = {"TMUX_TMPDIR": str(sockets), "HOME": str(room.path), "SHELL": "/bin/bash"}
    yield variables
    tmux(room, variables, "kill-server")


def tmux(room: Room, server: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = room.environment(**server)
    return subprocess.run(["tmux", *words], env=environment, capture_output=True, text=True)


def shown(out: str, what: str) -> str:
    """What a `==> what: value` line says."""
    (value,) = re.findall(rf"^==> {what} *: (.+)$", out, re.M)
    return value


def read_when(log: Path, ending: str) -> str:
    """The log, once it has a line with `ending`."""
    wait_until(lambda: log.exists() and re.search(ending, log.read_text()))
    return log.read_text()


# ---------------------------------------------------------------- one suite


@needs_tmux
def test_a_session_runs_a_suite_to_its_log(room: Room, server: dict[str, str]) -> None:
    """In the environment of its command, not in that of a tmux server from earlier."""
    room.write({"E2": ["a", "b", "c"]})
    old = {**server, "HP_EPOCHS": "3", "FORCE_SEED": "1"}
    assert tmux(room, old, "new-session", "-d", "-s", "old", "sleep 1000").returncode == 0
    logs = str(room.path / "my logs")
    words = ["--suite", "e2", "--round", "2 1", "--seed", "5", "--data", "some/AAA.jsonl"]
    words += ["--gpus", "0 3", "--gpu-plan", "1", "--logdir", logs]
    started = room.script("gla_tmux_nohup.sh", *words, HP_LR="2e-3", **server)
    assert started.returncode == 0, started.stderr
    name = shown(started.stdout, "tmux session")
    assert re.fullmatch(r"gla_e2_2_1_s5_AAA_\d{4}_\d{6}", name)
    assert shown(started.stdout, "log file") == f"{logs}/{name}.log"
    assert shown(started.stdout, "suite/round") == "e2 / 2 1"
    assert shown(started.stdout, "seed") == "5"
    assert shown(started.stdout, "data") == "some/AAA.jsonl"
    assert f"attach: tmux attach-session -t ={name}\n" in started.stdout
    assert f"follow: tail -f '{logs}/{name}.log'\n" in started.stdout

    log = read_when(Path(logs, f"{name}.log"), " END elapsed=.* status=")
    lines = log.splitlines()
    assert re.fullmatch(rf"{TIME} SESSION={name} START", lines[0])
    end = rf"{TIME} SESSION={name} END elapsed=\d\d:\d\d:\d\d \(\d+s\) status=0"
    assert re.fullmatch(end, lines[-1])
    assert log.index("ROUND=2 START") < log.index("ROUND=1 START")
    assert "[GPU 3] b.yaml  (HP_SEED=5; data=some/AAA.jsonl)" in lines
    assert sorted(room.order()) == ["a", "b", "c"]
    variables = room.variables("b")
    assert variables["HP_LR"] == "2e-3" and "HP_EPOCHS" not in variables
    assert not list((room.path / "tmp").iterdir())


@needs_tmux
def test_a_session_that_is_there_is_left_alone(room: Room, server: dict[str, str]) -> None:
    room.write({"E2": ["a"]})
    assert tmux(room, server, "new-session", "-d", "-s", "my_own", "sleep 1000").returncode == 0
    words = ["--name", "my.own", "--logdir", str(room.path / "logs")]
    refused = room.script("gla_tmux_nohup.sh", *words, **server)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert "tmux session my_own exists already" in refused.stderr
    assert not room.order()
    longer = room.script("gla_tmux_nohup.sh", "--name", "my", *words[2:], **server)
    assert longer.returncode == 0, "a name that another one begins with is free"
    read_when(room.path / "logs" / "my.log", "END elapsed")


@needs_tmux
def test_a_killed_session_stops_its_jobs(room: Room, server: dict[str, str]) -> None:
    room.write({"E2": ["a"]}, a=WAIT)
    words = ["--name", "x", "--logdir", str(room.path / "logs")]
    room.script("gla_tmux_nohup.sh", *words, **server)
    wait_until((room.path / "begun").exists)
    assert tmux(room, server, "kill-session", "-t", "=x").returncode == 0
    log = read_when(room.path / "logs" / "x.log", "SESSION=x END")
    assert "a.yaml  stopped (exit 75)" in log and log.rstrip().endswith("status=130")
    wait_until(lambda: not processes_with(str(room.path)))
    assert not list((room.path / "tmp").iterdir())


@needs_tmux
def test_a_terminal_is_attached(room: Room, server: dict[str, str]) -> None:
    room.write({"E2": ["a"]}, a=WAIT)
    ours, theirs = pty.openpty()
    command = ["bash", str(SCRIPTS / "gla_tmux_nohup.sh"), "--name", "y"]
    attached = subprocess.Popen(
        [*command, "--logdir", str(room.path / "logs")],
        env=room.environment(**server, TERM="xterm"),
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    clients = ["list-clients", "-F", "#{session_name}"]
    try:
        wait_until(lambda: tmux(room, server, *clients).stdout == "y\n")
    finally:
        tmux(room, server, "kill-session", "-t", "=y")
        assert attached.wait() == 0
        os.close(theirs)
        os.close(ours)
    read_when(room.path / "logs" / "y.log", "SESSION=y END")


@needs_tmux
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--suit", "E1"], 2, "usage: gla_tmux_nohup.sh"),
        (["--round"], 2, "usage: gla_tmux_nohup.sh"),
        (["--suite", "all"], 1, "--suite: 'all'"),
        (["--suite", "E7"], 1, "suite E7 is not in"),
        (["--round", "9"], 1, "Invalid round '9'. Valid values: 1 or 'all'."),
        (["--seed", "x"], 1, "--seed: 'x'"),
        (["--gpu-plan", "1 1"], 1, "GPU_PLAN: 2 numbers"),
        (["--help"], 0, ""),
    ],
    ids=str,
)
def test_a_wrong_session_is_refused_before_it_starts(
    room: Room, server: dict[str, str], words: list[str], code: int, said: str
) -> None:
    room.write({"E2": ["a"]})
    refused = room.script("gla_tmux_nohup.sh", *words, **server)
    assert refused.returncode == code
    assert said in refused.stderr
    assert tmux(room, server, "list-sessions").returncode != 0


def test_a_session_s_defaults(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    room.write({"E2": ["a"]})
    for name in set(os.environ) - set(room.environment()):
        monkeypatch.delenv(name)
    for name, value in room.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    session, said = plan_session(parse_arguments([]))
    assert re.fullmatch(r"gla_E2_all_s127_glue-tvt_cola_\d{4}_\d{6}", session.name)
    assert session.log == str(SCRIPTS / "logs" / f"{session.name}.log")
    assert session.words == ("E2", "all")
    assert said == [
        "==> suite/round : E2 / all",
        "==> seed        : 127",
        "==> data        : glue-tvt_cola",
    ]
    monkeypatch.setenv("DATA", "")
    monkeypatch.setenv("FORCE_SEED", "3")
    session, _ = plan_session(parse_arguments(["--suite", "ALL", "--round", "1", "--skip-done"]))
    assert session.name.startswith("gla_ALL_1_s3_own_")
    assert session.words == ("1", "--skip-done")


def test_without_tmux_the_way_to_it_is_said(room: Room) -> None:
    room.write({"E2": ["a"]})
    tools = room.path / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "basename"):
        (tools / name).symlink_to(str(shutil.which(name)))
    refused = room.script("gla_tmux_nohup.sh", PATH=str(tools))
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1 and "apt install tmux" in refused.stderr


# ---------------------------------------------------------------- several in turn


def start_batch(room: Room, server: dict[str, str], pairs: str) -> tuple[str, Path]:
    """(what the command printed, the batch's log)."""
    words = ["--suite", "E1", "--round", "all", "--pairs", pairs]
    logs = room.path / "logs"
    started = room.script("gla_batch_tmux.sh", *words, "--logdir", str(logs), "-d", **server)
    assert started.returncode == 0, started.stderr
    name = shown(started.stdout, "tmux session")
    assert re.fullmatch(r"batch_E1_all_\d{4}_\d{6}", name)
    log = Path(shown(started.stdout, "log file"))
    assert log == logs / f"{name}.log"
    return started.stdout, log


@needs_tmux
def test_a_batch_runs_its_pairs_in_turn_until_one_fails(room: Room, server: dict[str, str]) -> None:
    room.write({"E1": ["a"]}, a="! grep -q BBB $3 || exit 4")
    out, path = start_batch(room, server, "127:AAA, 87:BBB 5:CCC")
    plan = "== Batch plan ==\n  - 127:AAA\n  - 87:BBB\n  - 5:CCC\n"
    assert plan in out
    lines = read_when(path, "All jobs finished|Stopping").splitlines()
    logs, when = re.escape(f"{room.path}/logs"), r"\d{4}_\d{6}"
    expected = [
        *map(re.escape, plan.splitlines()),
        rf"{TIME} START idx=1 seed=127 data=AAA  -> {logs}/step1_s127_AAA_{when}\.log",
        rf"{TIME} END   idx=1 seed=127 data=AAA  status=0",
        rf"{TIME} START idx=2 seed=87 data=BBB  -> {logs}/step2_s87_BBB_{when}\.log",
        rf"{TIME} END   idx=2 seed=87 data=BBB  status=1",
        r"Job failed \(idx=2\)\. Stopping the batch\.",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    for i, (seed, data) in enumerate([("127", "AAA"), ("87", "BBB")], start=1):
        (log,) = (room.path / "logs").glob(f"step{i}_*.log")
        assert f"[CPU] a.yaml  (HP_SEED={seed}; data={data})" in log.read_text()
    assert room.order() == ["a", "a"]


@needs_tmux
def test_a_batch_ends_when_all_is_done(room: Room, server: dict[str, str]) -> None:
    room.write({"E1": ["a"]})
    _, path = start_batch(room, server, "1:AAA")
    lines = read_when(path, "All jobs finished|Stopping").splitlines()
    assert lines[-1] == "All jobs finished successfully."


@needs_tmux
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "--pairs"),
        (["--pairs", "127:AAA,87"], 2, "'87' is not SEED:DATA"),
        (["--pairs", "x:AAA"], 2, "'x:AAA' is not SEED:DATA"),
        (["--pairs", "127:"], 2, "'127:' is not SEED:DATA"),
        (["--pairs", " , "], 2, "no pair given"),
        (["--pairs", "1:A", "--seed", "2"], 2, "usage: gla_batch_tmux.sh"),
        (["--pairs", "1:A", "--round", "7"], 1, "Invalid round '7'"),
    ],
    ids=str,
)
def test_a_wrong_batch_is_refused_before_it_starts(
    room: Room, server: dict[str, str], words: list[str], code: int, said: str
) -> None:
    room.write({"E2": ["a"]})
    refused = room.script("gla_batch_tmux.sh", *words, **server)
    assert refused.returncode == code
    assert said in refused.stderr
    assert tmux(room, server, "list-sessions").returncode != 0
