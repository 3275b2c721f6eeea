"""The command line: runs a command, and says what went wrong in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ssm_train import commands
from ssm_train.arguments import build_parser
from ssm_train.commands import BAD_INPUT, INTERRUPTED
from ssm_train.errors import InputError, unusable
from ssm_train.secrets import redact
from ssm_train.terminal import printable

OTHER_PYTHON = "activate the environment that has ssm_train, or install it: pip install -e ."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Only our own errors keep a traceback."""
    try:
        check_python()
        return run(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ssm_train"):
            raise
        return refuse(InputError(f"{sys.executable} has no {error.name}; {OTHER_PYTHON}"))
    except InputError as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if (refusal := unusable(error)) is None:
            raise
        return refuse(refusal)


def check_python() -> None:
    """What is imported up to here has to load in older Pythons too."""
    if sys.version_info < (3, 11):  # noqa: UP036
        version = ".".join(map(str, sys.version_info[:3]))
        raise InputError(f"{sys.executable} is Python {version}, not 3.11 to 3.13; {OTHER_PYTHON}")


def run(argv: Sequence[str] | None) -> int:
    # Read when torch is loaded: threads that wait without spinning, so that busy cores stay usable.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.umask(os.umask(0) | 0o002)  # nothing that a run writes may be changed by everybody
    arguments, rest = build_parser().parse_known_args(argv)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if unknown := [word for word in rest if word not in overrides]:
        hint = commands.way_out(unknown[0], arguments.command)
        raise InputError(f"unknown argument {unknown[0]!r}; {hint}")
    if overrides and arguments.command != "train":
        raise InputError(f"{overrides[0]!r}: only `ssm-train train` takes key=value")
    arguments.rest = overrides
    return arguments.run(arguments)


def refuse(error: InputError) -> int:
    rank = os.environ.get("RANK", "0")
    who = "error" if rank == "0" else f"error (rank {rank})"
    for line in str(error).split("\n"):
        print(f"{who}: {printable(redact(line))}", file=sys.stderr)
    return BAD_INPUT
