"""What runs inside a tmux session: a suite, or several in turn, with all output in log files.
A file says which; `python -m ssm_train.launch.session FILE` is what tmux starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkstemp
from typing import BinaryIO

from ssm_train.launch.interrupt import Interrupt
from ssm_train.launch.rounds import clock, now


@dataclass(frozen=True)
class Step:
    """A suite with one seed on one data set."""

    seed: int
    data: str
    log: str


@dataclass(frozen=True)
class Session:
    """What a tmux session does."""

    name: str
    log: str
    """Of a batch: its own lines; each step has a log for the rest."""
    batch: bool
    words: tuple[str, ...]
    """Those of `gla_round_new.sh`."""
    steps: tuple[Step, ...]
    environment: dict[str, str]
    """Of the command that made the session. tmux would give its server's, which may be days old."""


def write_session(session: Session) -> Path:
    """Writes a file for its owner alone, as variables may hold keys; `read_session` removes it."""
    handle, path = mkstemp(prefix="suite-", suffix=".json")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(asdict(session), file)
    return Path(path)


def read_session(path: Path) -> Session:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    values["words"] = tuple(values["words"])
    values["steps"] = tuple(Step(**step) for step in values["steps"])
    return Session(**values)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the session of a file; returns the status of what failed, or 0."""
    (path,) = sys.argv[1:] if argv is None else argv
    session = read_session(Path(path))
    with Interrupt() as interrupt, open(session.log, "ab") as log:
        return (run_batch if session.batch else run_single)(session, interrupt, log)


def run_single(session: Session, interrupt: Interrupt, log: BinaryIO) -> int:
    """One suite; its log begins and ends with the session's name."""
    (step,) = session.steps
    began = time.monotonic()
    tell(f"{now()} SESSION={session.name} START", log)
    status = run_step(session, step, interrupt, log)
    seconds = time.monotonic() - began
    elapsed = f"elapsed={clock(seconds)} ({int(seconds)}s)"
    tell(f"{now()} SESSION={session.name} END {elapsed} status={status}", log)
    return status


def run_batch(session: Session, interrupt: Interrupt, log: BinaryIO) -> int:
    """The steps in turn, until one fails; returns that one's status."""
    for line in describe_batch(session.steps):
        tell(line, log)
    for i, step in enumerate(session.steps, start=1):
        what = f"idx={i} seed={step.seed} data={step.data}"
        tell(f"{now()} START {what}  -> {step.log}", log)
        with open(step.log, "ab") as step_log:
            status = run_step(session, step, interrupt, step_log)
        tell(f"{now()} END   {what}  status={status}", log)
        if status:
            tell(f"Job failed (idx={i}). Stopping the batch.", log)
            return status
    tell("All jobs finished successfully.", log)
    return 0


def describe_batch(steps: Sequence[Step]) -> list[str]:
    return ["== Batch plan ==", *(f"  - {step.seed}:{step.data}" for step in steps)]


def run_step(session: Session, step: Step, interrupt: Interrupt, log: BinaryIO) -> int:
    """Runs the suite, its output in the terminal and in the log; returns its exit status.

    Signals are passed to the suite, which stops its jobs; we stay until it has.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "ssm_train.launch.rounds", *session.words],
        env={**session.environment, "FORCE_SEED": str(step.seed), "DATA": step.data},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as suite:
        interrupt.child = suite
        if interrupt.received:  # before there was a child to pass it to
            suite.send_signal(interrupt.received)
        assert suite.stdout is not None
        while part := os.read(suite.stdout.fileno(), 65536):
            write(part, log)
        status = suite.wait()
        interrupt.child = None
    return status if status >= 0 else 128 - status


def tell(line: str, log: BinaryIO) -> None:
    write(f"{line}\n".encode(), log)


def write(part: bytes, log: BinaryIO) -> None:
    """Into the log, and into the terminal while there is one."""
    log.write(part)
    log.flush()
    with suppress(OSError):
        os.write(sys.stdout.fileno(), part)


if __name__ == "__main__":
    sys.exit(main())
