"""Files that survive a kill and a crash: written, synced, renamed, in steps that have names."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssm_train.errors import UNUSABLE_DISK, system_error

if TYPE_CHECKING:
    from torch import Tensor

SECONDS_TO_APPEAR = 10.0

at_write_point: Callable[[str], None] | None = None
"""Called at every write point. None but in fault tests, which kill the process there."""


def write_point(name: str) -> None:
    """Between two steps that a kill could separate."""
    if at_write_point:
        at_write_point(name)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an error of the disk that does not say which file it is about says that it is this
    one."""
    try:
        yield
    except Exception as error:
        found = system_error(error)
        if found is None or found.errno not in UNUSABLE_DISK or found.filename is not None:
            raise
        raise OSError(found.errno, found.strerror, str(path)) from error


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
    write_point(f"{path.name} written")
    sync(path)
    write_point(f"{path.name} synced")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Safetensors. Raises OSError where they cannot be written."""
    from safetensors import SafetensorError  # which loads torch
    from safetensors.torch import save_file

    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory (tied weights, views of a flat buffer).
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    try:
        save_file(separate, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    write_point(f"{path.name} written")
    sync(path)
    write_point(f"{path.name} synced")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small text file; a reader or a crash finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            partial.write_text(text, encoding="utf-8")
            write_point(f"{path.name} written")
            sync(partial)
            write_point(f"{path.name} synced")
            rename(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    write_point(f"{path.name} renamed")
    sync(path.parent)
    write_point(f"{path.name} rename synced")


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Rank 0. A directory to write in, which becomes `path` when all is written: no reader, and
    no later run, finds half of it. Where writing fails, nothing stays."""
    partial, old = (path.with_name(path.name + suffix) for suffix in (".tmp", ".old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with writing(path):
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in (*partial.rglob("*"), partial):
                sync(file)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if path.exists():
            rename(path, old)
        rename(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def rename(path: Path, to: Path) -> None:
    """Replaces `to`, if it is a file. A rename whose answer was lost, as NFS loses it, is asked for
    again and finds nothing: it has happened."""
    source = os.lstat(path)
    try:
        path.replace(to)
    except FileNotFoundError:
        if not (to.exists() and os.path.samestat(source, os.lstat(to))):
            raise


def sync(path: Path) -> None:
    """Asks the disk to have a file, or the names in a directory where that can be asked for."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network disks cannot
            raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A file, a directory with what is in it, or a symbolic link and nothing behind it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_if_possible(path: Path) -> None:
    """As far as it goes: NFS keeps the name of a file, in its directory, while someone reads it."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def appears(path: Path) -> bool:
    """Whether it is there, or comes in `SECONDS_TO_APPEAR`, as what another host has just written
    does on NFS."""
    until = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)
        with suppress(OSError):
            os.listdir(path.parent)  # which asks the server again
    return path.exists()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
