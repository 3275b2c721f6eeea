"""How many inputs are made: a few hundred a test in `make test`, the same ones each time; with
SSM_TRAIN_FUZZ=N (`make fuzz`) N times as many, others each time, and a hang ends a test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("SSM_TRAIN_FUZZ", "0"))
HANG_SECONDS = 60
MADE: dict[str, int] = {}
"""Test -> inputs that it has tried."""

settings.register_profile(
    "fuzz",
    deadline=None,
    database=None,
    derandomize=FACTOR == 0,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")


class Hang(BaseException):
    """An input on which our code does not come to an end."""


@contextmanager
def no_hang() -> Iterator[None]:
    """In `make fuzz`, ends what takes a minute; no input here is work for a second."""

    def end(*_: Any) -> None:
        raise Hang

    if not FACTOR:
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Counts the inputs of a property test, and watches over each."""
    handle: Any = getattr(pyfuncitem.obj, "hypothesis", None)
    if handle is not None:
        inner = handle.inner_test

        def counted(*args: Any, **values: Any) -> None:
            MADE[pyfuncitem.name] = MADE.get(pyfuncitem.name, 0) + 1
            with no_hang():
                inner(*args, **values)

        handle.inner_test = counted
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FACTOR and MADE:
        for name, count in sorted(MADE.items()):
            terminalreporter.write_line(f"{count:7,} inputs  {name}")
        terminalreporter.write_line(f"{sum(MADE.values()):7,} inputs in all")
