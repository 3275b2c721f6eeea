"""A training run as a process: started in a session of its own with a log file, waited for, and
stopped together with everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ssm_train.launch.interrupt import Interrupt

REQUEUE = 75  # exit code of a run that saved itself and wants to be started again
POLL_SECONDS = 0.1
TERM_SECONDS = 10.0  # between TERM and KILL, at most
KILL_SECONDS = 5.0  # until the kernel has taken a killed process away


@dataclass(frozen=True)
class Job:
    """One training run of a round."""

    config: str
    """File name of its config."""
    copy: Path
    """The config that it reads, with the suite's data in it."""
    data: str
    device: str
    environment: Mapping[str, str]
    log: Path


@dataclass(frozen=True)
class Started:
    """A job under way, or ended."""

    job: Job
    process: subprocess.Popen[bytes]
    began: float
    """By `time.monotonic`."""


def start_job(job: Job, python: str) -> Started:
    """Starts `train.py` as the leader of a session and of a process group."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        process = subprocess.Popen(
            [python, "train.py", "--cfg", str(job.copy), "--overwrite"],
            env=job.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Started(job, process, time.monotonic())


def wait_for_jobs(running: Sequence[Started], interrupt: Interrupt) -> Iterator[Started]:
    """Yields each job as it ends; returns early at an interrupt."""
    left = list(running)
    while left and not interrupt:
        ended = [started for started in left if started.process.poll() is not None]
        left = [started for started in left if started not in ended]
        yield from ended
        if not ended:
            time.sleep(POLL_SECONDS)


def stop_jobs(running: Sequence[Started], grace: float) -> None:
    """Ends the process groups that are left: INT, on which a run saves itself in `grace` seconds;
    TERM; KILL. Each comes only to those that the one before did not end."""
    steps = (
        (signal.SIGINT, grace),
        (signal.SIGTERM, min(grace, TERM_SECONDS)),
        (signal.SIGKILL, KILL_SECONDS),
    )
    left = [started for started in running if is_alive(started)]
    for number, seconds in steps:
        for started in left:
            with suppress(ProcessLookupError):  # ended meanwhile
                os.killpg(started.process.pid, number)
        deadline = time.monotonic() + seconds
        while left and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            left = [started for started in left if is_alive(started)]


def is_alive(started: Started) -> bool:
    """Whether the job, or anything that it started and left behind, is there."""
    started.process.poll()
    try:
        os.killpg(started.process.pid, 0)
    except (ProcessLookupError, PermissionError):  # macOS: only zombies are left
        return False
    return True


def describe_end(started: Started, interrupted: bool) -> str:
    """`done`, `FAILED (exit 2)`, ... of a job that has ended."""
    code = started.process.returncode
    if code is None:
        return f"did not end, not even by KILL (process {started.process.pid}),"
    if code == 0:
        return "done"
    reason = f"exit {code}" if code > 0 else f"signal {-code}: {signal.strsignal(-code)}"
    if interrupted:
        return f"stopped ({reason})"
    if code == REQUEUE:
        reason += ": it was asked to stop, saved itself, and wants to be started again"
    return f"FAILED ({reason})"


def read_tail(path: Path, lines: int = 20, at_most: int = 8192) -> list[str]:
    """The last lines of a log, out of its last bytes."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - at_most))
        return file.read().decode("utf-8", errors="replace").splitlines()[-lines:]
