"""Files that survive a kill and a crash: written, synced, renamed, in steps that have names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

at_write_point: Callable[[str], None] | None = None
"""Called at every write point. None but in fault tests, which kill the process there."""


def write_point(name: str) -> None:
    """Between two steps that a kill could separate."""
    if at_write_point:
        at_write_point(name)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
    write_point(f"{path.name} written")
    sync(path)
    write_point(f"{path.name} synced")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Safetensors. Raises OSError where they cannot be written."""
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
        partial.write_text(text, encoding="utf-8")
        write_point(f"{path.name} written")
        sync(partial)
        write_point(f"{path.name} synced")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    write_point(f"{path.name} renamed")
    sync(path.parent)
    write_point(f"{path.name} rename synced")


def sync(path: Path) -> None:
    """Asks the disk to have a file, or the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A file, a directory with what is in it, or a symbolic link and nothing behind it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
