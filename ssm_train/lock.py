"""One process owns a run directory: a file beside it that it holds locked, and that says who.

The kernel ends the lock with its process, however that ended: a dead owner's directory is free.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ssm_train.errors import InputError

ATTEMPTS, SECONDS_BETWEEN = 5, 0.05  # another process may only have looked
OURS: set[Path] = set()
"""What this process holds: its own locks do not bind it, and end when it closes the file again."""


class InUse(InputError):
    """Another process owns the directory."""


@contextmanager
def own(run_dir: Path, *, insist: bool = True) -> Iterator[None]:
    """Rank 0. Holds `<run_dir>.lock`, outside the directory, which `--overwrite` removes.

    Raises InUse when a living process of this host holds it, or any process of another one that
    insists; InputError when it is this very process, or the file is none of ours or cannot be
    locked. Without `insist` these are no reason to stop: then nothing is held.
    """
    path = lock_path(run_dir)
    if path in OURS:
        if not insist:
            yield
            return
        raise InputError(f"lock: this process owns {run_dir} already; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = take(path, run_dir)
    except InUse:
        raise
    except (InputError, OSError):
        if insist:
            raise
        yield
        return
    with file:
        OURS.add(path)
        try:
            file.truncate(0)
            who = {"host": socket.gethostname(), "pid": os.getpid(), "insists": insist}
            json.dump(who, file)
            file.flush()
            yield
        finally:
            OURS.remove(path)
            path.unlink(missing_ok=True)  # still locked, so nobody else's


def check_free(run_dir: Path) -> None:
    """Rank 0 of a run that does not insist. Raises as `own` does where another process owns the
    directory; what a dead one left is removed."""
    path = lock_path(run_dir)
    if path.exists() and path not in OURS:
        with own(run_dir, insist=False):
            pass


def lock_path(run_dir: Path) -> Path:
    return run_dir.resolve().with_name(run_dir.name + ".lock")


def take(path: Path, run_dir: Path) -> IO[str]:
    """The file, locked. Raises as `own` does."""
    here = socket.gethostname()
    for _ in range(ATTEMPTS):
        file = os.fdopen(open_no_link(path), "a+", encoding="utf-8")
        try:
            locked = lock(file, path)
            owner = read_owner(file, path)
        except InputError:
            file.close()
            raise
        elsewhere = owner.host not in ("", here)
        # Locks may end at a host's border: there what an owner says is believed, if it insists.
        if locked and not (elsewhere and owner.insists):
            return file
        file.close()
        if elsewhere:
            raise InUse(
                f"lock: process {owner.pid} on host {owner.host} owns {run_dir}; wait for it, or "
                f"remove {path} if it is gone"
            )
        time.sleep(SECONDS_BETWEEN)
    whose = f"process {owner.pid}" if owner.pid else "another process"
    raise InUse(f"lock: {whose} owns {run_dir}; wait for it, or choose another name")


def open_no_link(path: Path) -> int:
    """Opens the lock itself: behind a link, where others may write too, may be any file of ours."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"lock: {path} is a symbolic link; remove it") from None


def lock(file: IO[str], path: Path) -> bool:
    """Whether the file is locked by us now, and still the one at `path`. Raises InputError where
    the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if not os.fstat(file.fileno()).st_size:
            path.unlink(missing_ok=True)
        raise InputError(
            f"lock: {path} cannot be locked ({error.strerror}); run without lock, or set "
            "output_root or cache_dir to a file system that has locks"
        ) from None
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:  # its owner has just ended
        return False


@dataclass(frozen=True)
class Owner:
    """Who has written a lock: nobody yet, as long as `host` is empty."""

    host: str = ""
    pid: int = 0
    insists: bool = False


def read_owner(file: IO[str], path: Path) -> Owner:
    """Of the open file: to open and close it once more would end our lock."""
    file.seek(0)
    if not (text := file.read()):
        return Owner()
    try:
        owner = json.loads(text)
        # Of an earlier version only runs with `lock: true` wrote one.
        insists = bool(owner.get("insists", True))
        return Owner(str(owner["host"]), int(owner["pid"]), insists)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"lock: {path} is no lock of a run; remove it if no run uses the directory"
        ) from None
