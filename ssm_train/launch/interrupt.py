"""What Ctrl-C, SIGTERM and a closed terminal do to a launcher: they raise a flag, which it reads
when it can; they never tear it out of what it is doing."""

from __future__ import annotations

import signal
import subprocess
from typing import Any


class Interrupt:
    """True once a signal has come, and passes each on to `child`. Use as a context."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in self.SIGNALS:
            under_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        self.received = signal.Signals(number)
        if self.child is not None:
            self.child.send_signal(number)

    def __bool__(self) -> bool:
        return self.received is not None
