"""What a flag's text has to be. Raises argparse.ArgumentTypeError."""

from __future__ import annotations

import argparse
import math

from ssm_train.errors import InputError, whole_number


def positive(text: str) -> int:
    number = whole_number(text)
    if number is None or number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def time_limit(text: str) -> str:
    from ssm_train.launch.slurm import read_time

    try:
        read_time(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def amount(text: str) -> float:
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def number(text: str) -> float:
    """NaN where it is none, which no range holds."""
    try:
        return float(text)
    except ValueError:
        return math.nan
