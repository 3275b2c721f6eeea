"""The one error that means "your input, not our code": one line, with the way out, no traceback."""

from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints the message and exits 2."""


def near(name: str, known: Iterable[object]) -> str:
    """`; did you mean 'x'?` for the known names closest to `name`, or nothing."""
    from difflib import get_close_matches

    close = get_close_matches(name, [str(k) for k in known], n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
