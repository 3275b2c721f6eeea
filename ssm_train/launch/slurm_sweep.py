"""The runs of a suite for `slurm/sweep_array.sh`, a line each: config, data and seed, as its rounds
have them. `python -m ssm_train.launch.slurm_sweep E5` takes the words of `gla_round_new.sh`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ssm_train.errors import InputError
from ssm_train.launch.plan import plan_suite

ONE_SLOT = {"GPU_IDS": "", "CUDA_VISIBLE_DEVICES": "", "GPU_PLAN": "1"}
"""An element of an array has GPUs of its own: this machine's do not count, a round is one run."""


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    try:
        lines = list_runs(words)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def list_runs(words: Sequence[str]) -> list[str]:
    """A line a run, as a shell would read it; without words those of all suites. Raises
    InputError."""
    plan = plan_suite(words or ["all"], {**os.environ, **ONE_SLOT})
    settings = [f"seed={plan.seed}", *([f"data={plan.data}"] if plan.data else [])]
    configs = [config for configs in plan.rounds.values() for config in configs]
    return [shlex.join([str(Path(plan.cfg_dir) / config), *settings]) for config in configs]


if __name__ == "__main__":
    sys.exit(main())
