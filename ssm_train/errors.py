"""The one error that means "your input, not our code": one line, with the way out, no traceback."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable

UNUSABLE_PATH = (errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
UNUSABLE_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE,
)  # fmt: skip


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints the message and exits 2."""


def whole_number(text: str) -> int | None:
    """What at most 18 digits write; None for other text. (`isdigit` takes "²", which int refuses,
    and int refuses 5,000 digits.)"""
    plain = text.isascii() and text.isdigit() and len(text) <= 18
    return int(text) if plain else None


def unusable(error: Exception) -> InputError | None:
    """What a path that the system refuses, or a disk that fails, means to the user; None for any
    other error."""
    found = system_error(error)
    if found is None:
        return None
    if found.errno in UNUSABLE_DISK:
        return InputError(
            f"{found.filename or 'a file'}: {found.strerror}; make room, or make it writable, and "
            "start again: a run goes on with --resume"
        )
    if found.errno not in UNUSABLE_PATH or found.filename is None:
        return None
    return InputError(f"{found.filename}: {found.strerror}; give another path")


def system_error(error: Exception) -> OSError | None:
    """The system's error that an exception is, or that a library in Rust (safetensors, tokenizers)
    tells of in words."""
    if isinstance(error, OSError):
        return error
    told = re.search(r"\(os error (\d{1,4})\)", str(error))
    return OSError(int(told[1]), os.strerror(int(told[1]))) if told else None


def near(name: str, known: Iterable[object]) -> str:
    """`; did you mean 'x'?` for the known names closest to `name`, or nothing."""
    from difflib import get_close_matches

    close = get_close_matches(name, [str(k) for k in known], n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
