"""The one error that means "your input, not our code": one line, with the way out, no traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterable

UNUSABLE_PATH = (errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints the message and exits 2."""


def whole_number(text: str) -> int | None:
    """What at most 18 digits write; None for other text. (`isdigit` takes "²", which int refuses,
    and int refuses 5,000 digits.)"""
    plain = text.isascii() and text.isdigit() and len(text) <= 18
    return int(text) if plain else None


def unusable_path(error: OSError) -> InputError | None:
    """What a path that the system refuses means to the user; None where it is no such error."""
    if error.errno not in UNUSABLE_PATH or error.filename is None:
        return None
    return InputError(f"{error.filename}: {error.strerror}; give another path")


LONGEST_LINE = 2_000  # a name in a data file may have a megabyte


def printable(line: str) -> str:
    """A line of a message for the terminal: what a user's file brings into it can neither fill the
    screen nor steer it."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    half = LONGEST_LINE // 2
    return safe if len(safe) <= LONGEST_LINE else f"{safe[:half]} ... {safe[-half:]}"


def near(name: str, known: Iterable[object]) -> str:
    """`; did you mean 'x'?` for the known names closest to `name`, or nothing."""
    from difflib import get_close_matches

    close = get_close_matches(name, [str(k) for k in known], n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
