"""A process without progress ends itself and leaves its stacks; one with progress does not."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssm_train.watchdog import beat, unwatched, watch

HANGS = """
import sys, threading
from pathlib import Path
from ssm_train.watchdog import watch

def wait_for_nothing():
    threading.Event().wait()

with watch(0.4, Path(sys.argv[1]), rank=3):
    wait_for_nothing()
"""


@pytest.mark.parametrize("writable", [True, False])
def test_a_process_that_hangs_ends_with_its_stacks(writable: bool, tmp_path: Path) -> None:
    file = tmp_path / ("stacks.txt" if writable else "no/directory/stacks.txt")
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(file)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: rank 3: no progress for 0.4 s" in done.stderr
    stacks = file.read_text() if writable else done.stderr
    assert "wait_for_nothing" in stacks and "thread MainThread" in stacks
    assert stacks.index("wait_for_nothing") < stacks.index("thread watchdog")


def test_progress_keeps_it_away(tmp_path: Path) -> None:
    file = tmp_path / "stacks.txt"
    with watch(0.4, file, 0):
        for _ in range(8):
            time.sleep(0.1)
            beat()
    time.sleep(0.6)  # it is gone
    assert not file.exists()


def test_work_with_limits_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "stacks.txt"
    with watch(0.2, file, 0), unwatched():
        time.sleep(0.6)
    assert not file.exists()


def test_none_at_all(tmp_path: Path) -> None:
    with watch(0, tmp_path / "stacks.txt", 0):
        time.sleep(0.05)
