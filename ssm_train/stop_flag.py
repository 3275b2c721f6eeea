"""One stop flag for all ranks, which signals set."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from typing import Any


class Interrupted(Exception):
    """Work was given up, on all ranks, because one of them is to stop."""


class StopFlag:
    """Set by SIGTERM, SIGUSR1, SIGUSR2, SIGURG or Ctrl-C; the ranks agree on it through the step's
    status.

    A second SIGTERM or Ctrl-C interrupts at once, also a process that waits for another one. The
    others only ask, as a job script does again and again: by URG, which harms no process that does
    not listen yet. Use as a context: the old handlers come back at the end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG, signal.SIGINT)
    INSISTENT = (signal.SIGTERM, signal.SIGINT)
    SECONDS_OF_ONE = 1.0
    """A terminal signals every process, and a launcher passes its own on: these count once."""
    SECONDS_TO_END = 5.0
    """After which an interrupt that is not heard, in a call that does not return, ends anyway."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._interrupted = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        heard, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        # Written by the signal itself: Python's handlers wait until the main thread is in Python.
        self._old_fd = signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        for number in self.SIGNALS:
            self._old[number] = signal.signal(number, self._receive)
        self._left = threading.Event()
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._left.set()
        os.close(self._tell)  # which ends the thread

    def _receive(self, number: int, _: object) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def _listen(self, heard: int) -> None:
        first: float | None = None
        while number := os.read(heard, 1):
            if number[0] not in self.INSISTENT:
                continue
            now = time.monotonic()
            first = now if first is None else first
            if now - first > self.SECONDS_OF_ONE:
                self._interrupted = True
                _thread.interrupt_main()
                if not self._left.wait(self.SECONDS_TO_END):
                    os.write(2, b"interrupted\n")
                    os._exit(128 + signal.SIGINT)
                break
        os.close(heard)

    def __bool__(self) -> bool:
        return self.signal is not None
