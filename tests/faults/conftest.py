"""The tiny runs of tests/integration, and a count of the faults that were survived."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

COUNTS: Counter[str] = Counter()
LINES: list[str] = []


@pytest.fixture(scope="session")
def survived() -> Callable[..., None]:
    """`survived(fault, count)`, for docs/reliability.md."""

    def count(fault: str, number: int = 1) -> None:
        COUNTS[fault] += number

    return count


@pytest.fixture(scope="session")
def say() -> Callable[[str], None]:
    """A line of figures, for docs/reliability.md."""
    return LINES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("survived")
    for fault, number in COUNTS.items():
        terminalreporter.write_line(f"{number:>7,}  {fault}")
    for line in LINES:
        terminalreporter.write_line(line)
