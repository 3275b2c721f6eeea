"""The tiny runs of tests/integration, and a count of the faults that were survived."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from small_disks import REASON, mount_disk

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


@pytest.fixture
def disks() -> Iterator[Callable[[Path], Path]]:
    """Mounts a small disk at an empty directory."""
    with ExitStack() as stack:

        def make(place: Path) -> Path:
            place.mkdir(exist_ok=True)
            if not mount_disk(place):
                pytest.skip(REASON)
            stack.callback(subprocess.run, ["umount", "--lazy", str(place)], check=True)
            return place

        yield make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("survived")
    for fault, number in COUNTS.items():
        terminalreporter.write_line(f"{number:>7,}  {fault}")
    for line in LINES:
        terminalreporter.write_line(line)
