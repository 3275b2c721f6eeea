"""Sessions of tmux: a suite in one of them, with a log, outlives the terminal it was started in.
`python -m ssm_train.launch.tmux` is `gla_tmux_nohup.sh`."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from ssm_train.commands import DONE, FAILED
from ssm_train.errors import InputError
from ssm_train.launch.plan import DATA, parse_seed, plan_suite, short_name
from ssm_train.launch.session import Session, Step, write_session
from ssm_train.launch.suites import ALL_SUITES, SKIP_DONE, SUITE

DEFAULT_SUITE, DEFAULT_ROUND, DEFAULT_SEED = "E2", "all", "127"
LOG_DIR = "scripts/train/new/logs"
EXISTS = 3  # exit code: the session is there
# What an interpreter may need before it has read the session's file.
START_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")


class SessionExists(InputError):
    """tmux has a session of that name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the session that the arguments describe; returns the exit code."""
    arguments = parse_arguments(argv)
    return launch(lambda: plan_session(arguments), arguments.detach)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser("gla_tmux_nohup.sh", "Run a suite in a tmux session with a log file.")
    parser.add_argument("--seed", help=f"training seed (default: $FORCE_SEED or {DEFAULT_SEED})")
    parser.add_argument("--data", help=f"data of all configs (default: $DATA or {DATA})")
    return parser.parse_args(argv)


def build_parser(program: str, what: str) -> argparse.ArgumentParser:
    """The options that a session and a batch share. Bad usage ends with exit code 2."""
    parser = argparse.ArgumentParser(prog=program, description=what, allow_abbrev=False)
    parser.add_argument("--suite", default=DEFAULT_SUITE, help="E1, E2 (default), ... or ALL")
    parser.add_argument("--round", default=DEFAULT_ROUND, help='all (default), or numbers: "3 1"')
    parser.add_argument("--name", help="name of the session (default: made of what it runs)")
    parser.add_argument("--logdir", default=LOG_DIR, help=f"default: {LOG_DIR}")
    parser.add_argument("--gpus", help="ids of the GPUs, as GPU_IDS")
    parser.add_argument("--gpu-plan", help="jobs on each GPU, as GPU_PLAN")
    parser.add_argument(SKIP_DONE, action="store_true", help="leave out complete runs")
    parser.add_argument("-d", "--detach", action="store_true", help="do not attach the terminal")
    return parser


def plan_session(arguments: argparse.Namespace) -> tuple[Session, list[str]]:
    """(the session, what to print about it). Raises InputError for what the suite would refuse."""
    environment = suite_environment(arguments)
    seed = arguments.seed or environment.get("FORCE_SEED") or DEFAULT_SEED
    environment["FORCE_SEED"] = str(parse_seed(seed, "--seed"))
    if arguments.data is not None:
        environment["DATA"] = arguments.data
    words = suite_words(arguments)
    data = plan_suite(words, environment).data
    what = f"{arguments.suite}_{arguments.round}_s{seed}_{short_name(data) or 'own'}"
    name = clean_name(arguments.name or f"gla_{what}_{timestamp()}")
    log = str(Path(arguments.logdir).resolve() / f"{name}.log")
    session = Session(name, log, False, words, (Step(int(seed), data, log),), environment)
    return session, [
        f"==> suite/round : {arguments.suite} / {arguments.round}",
        f"==> seed        : {seed}",
        f"==> data        : {data or 'of each config'}",
    ]


def suite_environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Our variables, with what the options say about GPUs."""
    options = {"GPU_IDS": arguments.gpus, "GPU_PLAN": arguments.gpu_plan}
    return {**os.environ, **{name: text for name, text in options.items() if text is not None}}


def suite_words(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The words for `gla_round_new.sh`."""
    suite = arguments.suite
    if suite != ALL_SUITES and not SUITE.fullmatch(suite):
        raise InputError(f"--suite: {suite!r} is not a suite's name; use E and a number, or ALL")
    skip = [SKIP_DONE] if arguments.skip_done else []
    return (*([] if suite == ALL_SUITES else [suite]), *arguments.round.split(), *skip)


def timestamp() -> str:
    return f"{datetime.now():%m%d_%H%M%S}"


def clean_name(name: str) -> str:
    """A name that tmux takes (no `.` or `:`) and that can be a file's."""
    return re.sub(r"[^\w-]+", "_", name)


def launch(plan: Callable[[], tuple[Session, list[str]]], detach: bool) -> int:
    """Starts a planned session, says so, and attaches the terminal, if there is one."""
    try:
        if shutil.which("tmux") is None:
            raise InputError("tmux is not installed; install it, for instance: apt install tmux")
        session, lines = plan()
        start_session(session)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return EXISTS if isinstance(error, SessionExists) else FAILED
    lines = [f"==> tmux session: {session.name}", f"==> log file    : {session.log}", *lines]
    detach = detach or not (sys.stdin.isatty() and sys.stdout.isatty())
    if detach:
        lines.append(f"attach: tmux attach-session -t ={session.name}")
        lines.append(f"follow: tail -f {shlex.quote(session.log)}")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
    if not detach:
        inside = "switch-client" if "TMUX" in os.environ else "attach-session"
        os.execvp("tmux", ["tmux", inside, "-t", f"={session.name}"])
    return DONE


def start_session(session: Session) -> None:
    """Starts it in the background, and returns once it runs. Raises InputError."""
    if has_session(session.name):
        raise SessionExists(
            f"tmux session {session.name} exists already; attach to it (tmux attach-session -t "
            f"={session.name}), end it, or give another --name"
        )
    try:
        Path(session.log).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--logdir: {error.filename}: {error.strerror}") from None
    file = write_session(session)
    variables = [f"{name}={os.environ[name]}" for name in START_VARIABLES if name in os.environ]
    program = [sys.executable, "-m", "ssm_train.launch.session", str(file)]
    started = subprocess.run(
        ["tmux", "new-session", "-d", "-s", session.name, "-c", os.getcwd()]
        + ["env", *variables, *program],
        capture_output=True,
        text=True,
    )
    while file.exists() and has_session(session.name):  # until it has been read
        time.sleep(0.05)
    if file.exists():
        file.unlink()
        reason = started.stderr.strip() or "its first process ended at once"
        raise InputError(f"tmux session {session.name} did not start: {reason}")


def has_session(name: str) -> bool:
    """Whether tmux has a session of exactly this name."""
    return not subprocess.run(
        ["tmux", "has-session", "-t", f"={name}"], capture_output=True
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
