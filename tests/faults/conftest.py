"""The tiny runs of tests/integration, and a count of the faults that were survived."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="session")
def survived() -> Callable[..., None]:
    """`survived(fault, count)`, for docs/reliability.md."""

    def count(fault: str, number: int = 1) -> None:
        COUNTS[fault] += number

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("survived")
    for fault, number in COUNTS.items():
        terminalreporter.write_line(f"{number:>7,}  {fault}")
