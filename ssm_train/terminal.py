"""Lines for the terminal of whoever started the program."""

from __future__ import annotations

import sys

LONGEST_LINE = 2_000  # a name in a data file may have a megabyte


def say(line: str) -> None:
    """Prints a line at once: others may read it through a pipe."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def printable(line: str) -> str:
    """A line of a message for the terminal: what a user's file brings into it can neither fill the
    screen nor steer it."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    half = LONGEST_LINE // 2
    return safe if len(safe) <= LONGEST_LINE else f"{safe[:half]} ... {safe[-half:]}"
