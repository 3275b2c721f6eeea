"""A process that makes no progress ends itself, and says where it stood. In a run of several, all
wait for the one that hangs, so that each writes its own stack."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

_watchdogs: list[Watchdog] = []


def beat() -> None:
    """Progress: called after every step, evaluated batch and compiled kernel."""
    for watchdog in _watchdogs:
        watchdog.last = time.monotonic()


@contextmanager
def unwatched() -> Iterator[None]:
    """Inside, nothing counts as a lack of progress: for work that has limits of its own."""
    for watchdog in _watchdogs:
        watchdog.last = math.inf
    try:
        yield
    finally:
        beat()


@contextmanager
def watch(seconds: float, file: Path, rank: int) -> Iterator[None]:
    """Inside, `seconds` without a `beat` end the process with exit code 1, after the stacks of its
    threads are in `file`. 0: never."""
    if not seconds:
        yield
        return
    watchdog = Watchdog(seconds, file, rank)
    _watchdogs.append(watchdog)
    watchdog.start()
    try:
        yield
    finally:
        _watchdogs.remove(watchdog)
        watchdog.done.set()
        watchdog.join()


class Watchdog(threading.Thread):
    def __init__(self, seconds: float, file: Path, rank: int) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.seconds, self.file, self.rank = seconds, file, rank
        self.last = time.monotonic()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self.last > self.seconds:
                self.bite()

    def bite(self) -> None:
        said = f"rank {self.rank}: no progress for {self.seconds:g} s"
        stacks = describe_stacks()
        try:
            self.file.write_text(f"{datetime.now():%F %T} {said}\n\n{stacks}", encoding="utf-8")
            where = f"its stack is in {self.file}"
        except OSError as error:  # of all moments: the disk is full
            where = f"its stack cannot be written ({error}):\n{stacks}"
        sys.stderr.write(f"error: {said}; the run ends (watchdog_seconds); {where}\n")
        sys.stderr.flush()
        os._exit(1)  # a thread that hangs can be ended in no other way


def describe_stacks() -> str:
    """Of all threads, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
    )
