"""One process owns a run directory: a file beside it says which; a dead owner loses it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssm_train.errors import InputError


class InUse(InputError):
    """Another process owns the directory."""


@contextmanager
def own(run_dir: Path) -> Iterator[None]:
    """Rank 0. Holds `<run_dir>.lock`, outside the directory, which `--overwrite` removes.

    Raises InUse when a living process of this host, or any process of another one, holds it;
    InputError when it is this very process, or the file cannot be read.
    """
    path = run_dir.with_name(run_dir.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    host, me = socket.gethostname(), os.getpid()
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except FileExistsError:
            refuse_living_owner(path, host)
            path.unlink(missing_ok=True)
    with os.fdopen(handle, "w") as file:
        json.dump({"host": host, "pid": me}, file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def refuse_living_owner(path: Path, host: str) -> None:
    """Returns when the owner is known to be dead."""
    try:
        if not path.read_text():
            time.sleep(0.1)  # just made: its owner is about to write
        owner = json.loads(path.read_text())
        other, pid = str(owner["host"]), int(owner["pid"])
    except FileNotFoundError:
        return  # just released
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"lock: {path} cannot be read; remove it if no run uses the directory"
        ) from None
    if other != host:
        raise InUse(
            f"lock: process {pid} on host {other} owns this run directory; wait for it, or remove "
            f"{path} if it is gone"
        )
    if alive(pid):
        raise (InputError if pid == os.getpid() else InUse)(
            f"lock: process {pid} owns this run directory; wait for it, or choose another name"
        )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, and alive
        return True
    return True
