"""A suite with several seeds and data sets, one after the other, in one tmux session.
`python -m ssm_train.launch.batch` is `gla_batch_tmux.sh`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ssm_train.launch.plan import plan_suite, short_name
from ssm_train.launch.session import Session, Step, describe_batch
from ssm_train.launch.slots import split_list
from ssm_train.launch.tmux import (
    build_parser,
    clean_name,
    launch,
    suite_environment,
    suite_words,
    timestamp,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the batch that the arguments describe; returns the exit code."""
    parser = build_parser(
        "gla_batch_tmux.sh", "Run a suite with several seeds and data sets in one tmux session."
    )
    parser.add_argument(
        "--pairs", required=True, type=parse_pairs, metavar='"SEED:DATA,SEED:DATA"',
        help="what to run in turn, between commas or spaces",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    return launch(lambda: plan_batch(arguments), arguments.detach)


def parse_pairs(text: str) -> list[tuple[int, str]]:
    """Seed and data of each pair. Raises ArgumentTypeError naming the first that is none."""
    pairs = []
    for pair in split_list(text):
        match = re.fullmatch(r"([0-9]+):(.+)", pair)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{pair!r} is not SEED:DATA, such as 127:glue-tvt_cola"
            )
        pairs.append((int(match[1]), match[2]))
    if not pairs:
        raise argparse.ArgumentTypeError("no pair given, such as 127:glue-tvt_cola")
    return pairs


def plan_batch(arguments: argparse.Namespace) -> tuple[Session, list[str]]:
    """(the session, what to print about it). Raises InputError for what a suite would refuse."""
    environment, words = suite_environment(arguments), suite_words(arguments)
    began = timestamp()
    name = clean_name(arguments.name or f"batch_{arguments.suite}_{arguments.round}_{began}")
    logs = Path(arguments.logdir).resolve()
    steps = []
    for i, (seed, data) in enumerate(arguments.pairs, start=1):
        plan_suite(words, {**environment, "FORCE_SEED": str(seed), "DATA": data})
        log = logs / f"step{i}_s{seed}_{short_name(data)}_{began}.log"
        steps.append(Step(seed, data, str(log)))
    session = Session(name, str(logs / f"{name}.log"), True, words, tuple(steps), environment)
    return session, [
        f"==> suite/round : {arguments.suite} / {arguments.round}",
        *describe_batch(session.steps),
    ]


if __name__ == "__main__":
    sys.exit(main())
