"""Who may own a run directory. Other owners are real processes: a lock is the kernel's."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ssm_train.errors import InputError
from ssm_train.lock import InUse, check_free, lock_path, own

HOLD = """
import sys
from pathlib import Path
from ssm_train.lock import own

with own(Path(sys.argv[1])):
    print("owned", flush=True)
    input()
"""
RACE = """
import sys
from pathlib import Path
from ssm_train.lock import InUse, own

input()
try:
    with own(Path(sys.argv[1])):
        print("owned", flush=True)
        input()
except InUse as error:
    print(error, flush=True)
"""


def start(program: str, run_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def owned_by_another(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    with start(HOLD, run_dir) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        yield process
        process.communicate("\n")


def write_lock(run_dir: Path, text: str) -> Path:
    path = run_dir.with_name(run_dir.name + ".lock")
    path.write_text(text)
    return path


def owner(pid: int, host: str | None = None, insists: bool = True) -> str:
    return json.dumps({"host": host or socket.gethostname(), "pid": pid, "insists": insists})


def test_an_owner_writes_who_it_is_and_leaves_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    for _ in range(2):
        with own(tmp_path / "run"):
            assert json.loads(lock.read_text()) == json.loads(owner(os.getpid()))
        assert not lock.exists()
    with pytest.raises(ZeroDivisionError), own(tmp_path / "run"):
        1 / 0  # noqa: B018
    assert not lock.exists()


def test_a_second_process_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with owned_by_another(run_dir) as other:
        message = f"process {other.pid} owns {run_dir}; wait for it, or choose another name"
        for _ in range(2):  # a refused process takes nothing away
            with pytest.raises(InUse, match=message), own(run_dir):
                pass
            with pytest.raises(InUse, match=message):
                check_free(run_dir)
    with own(run_dir):
        pass


def test_a_process_does_not_own_twice_and_may_use_what_it_owns(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with own(run_dir):
        check_free(run_dir)
        with pytest.raises(InputError, match="this process owns .*run already") as caught:
            own(run_dir).__enter__()
        assert not isinstance(caught.value, InUse)
        refused = start(RACE, run_dir).communicate("\n\n")[0]
        assert refused.startswith(f"lock: process {os.getpid()} owns {run_dir}")


def test_a_killed_owner_is_dead_whoever_has_its_number_now(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with owned_by_another(run_dir) as other:
        other.kill()
        other.wait()
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == other.pid
    write_lock(run_dir, owner(os.getppid()))  # a living process, which owns nothing
    with own(run_dir):
        pass
    write_lock(run_dir, owner(os.getpid()))  # of a container that was started again
    check_free(run_dir)
    assert not (tmp_path / "run.lock").exists()
    write_lock(run_dir, "")  # killed before it wrote
    with own(run_dir):
        pass


def test_of_many_who_find_a_dead_owner_one_takes_over(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_lock(run_dir, owner(2**22 + 1))
    racers = [start(RACE, run_dir) for _ in range(4)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.stdout.readline() for racer in racers if racer.stdout is not None]
    assert sorted(line.split()[0] for line in said) == ["lock:", "lock:", "lock:", "owned"]
    for racer in racers:
        racer.communicate("\n")


def test_another_host_is_believed(tmp_path: Path) -> None:
    lock = write_lock(tmp_path / "run", owner(1, "elsewhere"))
    for refused in (
        lambda: own(tmp_path / "run").__enter__(),
        lambda: check_free(tmp_path / "run"),
    ):
        with pytest.raises(InUse, match=f"1 on host elsewhere owns .*remove {lock} if it is gone"):
            refused()
    assert json.loads(lock.read_text())["host"] == "elsewhere"


def test_another_host_that_does_not_insist_is_believed_while_it_holds_the_lock(
    tmp_path: Path,
) -> None:
    """Where locks cross hosts; where they end at one, its node may be long gone."""
    run_dir = tmp_path / "run"
    with owned_by_another(run_dir):
        lock_path(run_dir).write_text(owner(1, "elsewhere", insists=False))
        with pytest.raises(InUse, match="1 on host elsewhere owns"):
            own(run_dir, insist=False).__enter__()
    write_lock(run_dir, owner(1, "elsewhere", insists=False))
    check_free(run_dir)
    assert not lock_path(run_dir).exists()


def test_a_file_system_without_locks_ends_only_who_insists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    for _ in range(2):
        with own(tmp_path / "run", insist=False):
            assert not lock_path(tmp_path / "run").exists()
        check_free(tmp_path / "run")
    with pytest.raises(InputError, match=r"cannot be locked \(No locks available\); run without"):
        own(tmp_path / "run").__enter__()
    lock_path(tmp_path / "run").touch()  # as a process that was killed leaves it
    check_free(tmp_path / "run")
    assert not lock_path(tmp_path / "run").exists()


def test_who_does_not_insist_goes_on_without(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with own(run_dir), own(run_dir, insist=False):
        assert json.loads(lock_path(run_dir).read_text())["insists"]
    for text in ("{", '{"host": "x"}'):  # none of ours
        write_lock(run_dir, text)
        with own(run_dir, insist=False):
            assert lock_path(run_dir).read_text() == text
    with own(tmp_path / "run.lock" / "below", insist=False):  # no directory
        pass
    with own(tmp_path / "other", insist=False):
        refused = start(RACE, tmp_path / "other").communicate("\n\n")[0]
        assert refused.startswith(f"lock: process {os.getpid()} owns {tmp_path / 'other'}")
        assert json.loads((tmp_path / "other.lock").read_text())["insists"] is False


@pytest.mark.parametrize("text", ["{", "[]", '{"host": "x"}', '{"host": "x", "pid": "y"}'])
def test_a_file_that_is_no_lock_is_left_alone(tmp_path: Path, text: str) -> None:
    lock = write_lock(tmp_path / "run", text)
    with pytest.raises(InputError, match="run.lock is no lock of a run; remove it"):
        own(tmp_path / "run").__enter__()
    assert lock.read_text() == text
