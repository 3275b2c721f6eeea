"""Which signals ask for a stop and which end a process at once, seen on forked children."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ssm_train.commands import INTERRUPTED
from ssm_train.stop_flag import StopFlag

LONG = 0.4  # seconds between signals that count as two


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopFlag, "SECONDS_OF_ONE", LONG - 0.1)
    monkeypatch.setattr(StopFlag, "SECONDS_TO_END", 0.2)


@contextmanager
def child(work: Callable[[StopFlag], int]) -> Iterator[int]:
    """The process of `work`, once it listens."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            with StopFlag() as stop:
                os.write(tell, b"!")
                code = work(stop)
        except KeyboardInterrupt:
            code = INTERRUPTED
        finally:
            os._exit(code)
    os.read(ready, 1)
    yield pid
    os.close(ready)
    os.close(tell)


def send(pid: int, *numbers: signal.Signals, pause: float) -> None:
    for i, number in enumerate(numbers):
        if i:
            time.sleep(pause)
        os.kill(pid, number)


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stop_at_once(stop: StopFlag) -> int:
    """Returns the signal."""
    while not stop:
        time.sleep(0.01)
    return int(stop.signal or 0)


def save_slowly(stop: StopFlag) -> int:
    """Returns the last signal some time after the first."""
    stop_at_once(stop)
    time.sleep(3 * LONG)
    return int(stop.signal or 0)


def never_return(stop: StopFlag) -> int:
    """As a collective whose other process hangs: no handler of Python's runs in it."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    return 0


@pytest.mark.parametrize("number", StopFlag.SIGNALS)
def test_one_signal_asks(number: signal.Signals) -> None:
    with child(stop_at_once) as pid:
        send(pid, number, pause=0)
        assert end_of(pid) == number


@pytest.mark.parametrize("number", StopFlag.INSISTENT)
@pytest.mark.parametrize("first", StopFlag.INSISTENT)
def test_a_second_one_interrupts(first: signal.Signals, number: signal.Signals) -> None:
    with child(save_slowly) as pid:
        send(pid, first, number, pause=LONG)
        assert end_of(pid) == INTERRUPTED


def test_one_that_a_launcher_passes_on_counts_once() -> None:
    with child(save_slowly) as pid:
        send(pid, signal.SIGINT, signal.SIGINT, signal.SIGTERM, pause=0.05)
        assert end_of(pid) == signal.SIGTERM


@pytest.mark.parametrize("number", sorted(set(StopFlag.SIGNALS) - set(StopFlag.INSISTENT)))
def test_a_job_script_may_ask_again_and_again(number: signal.Signals) -> None:
    with child(save_slowly) as pid:
        send(pid, *[number] * 4, pause=LONG / 3)
        assert end_of(pid) == number


def test_a_process_that_waits_is_interrupted() -> None:
    with child(never_return) as pid:
        send(pid, signal.SIGINT, signal.SIGINT, pause=LONG)
        assert end_of(pid) == INTERRUPTED


def test_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in StopFlag.SIGNALS]
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop and stop.signal == signal.SIGUSR1
    assert [signal.getsignal(number) for number in StopFlag.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
