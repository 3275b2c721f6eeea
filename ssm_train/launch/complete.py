"""Which runs of a suite are there: complete and of the same config, so that they need not run
again; and the table of them. Loads torch, so only when asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssm_train.errors import InputError
from ssm_train.record import MARKER, RESULT, recorded_peft
from ssm_train.record.environment import read_environment

COMPLETE = ("finished", "low_metric")


def find_complete_run(config: Path, environment: Mapping[str, str]) -> tuple[Path | None, str]:
    """(its directory, "") where a run of this config under these variables is complete; else
    (None, why it has to run)."""
    from ssm_train.bases import differing_keys
    from ssm_train.config import load_config, run_directory
    from ssm_train.peft.spec import load_peft

    try:
        cfg, _ = load_config(config, environment=environment)
        run_dir = run_directory(cfg, config)
        marker = run_dir / MARKER
        if not marker.is_file():
            return None, f"no run in {run_dir}"
        outcome = read_outcome(run_dir)
        if outcome not in COMPLETE:
            return None, f"{run_dir} is not complete (outcome: {outcome})"
        changed = differing_keys(load_config(marker)[0], cfg)
        peft = load_peft(cfg.peft, cfg.peft_overrides.given())
    except InputError as error:
        return None, str(error)
    if changed:
        return None, f"{run_dir} differs in {', '.join(changed)}"
    if peft is not None and recorded_peft(run_dir) != json.loads(json.dumps(peft.dump())):
        return None, f"{run_dir} was trained with other PEFT settings than {cfg.peft} has now"
    return run_dir, ""


def read_outcome(run_dir: Path) -> str | None:
    """How a run ended, as its `result.json` says; None without one, or with a broken one."""
    try:
        result = json.loads((run_dir / RESULT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return result.get("outcome") if isinstance(result, dict) else None


def was_started_with(run_dir: Path, config: Path) -> bool:
    """Whether a run's record has this config in its command. That of a suite's job is a copy whose
    place no other suite has had."""
    try:
        return str(config) in read_environment(run_dir)["command"]
    except (InputError, KeyError):
        return False


def report_suite(runs: Sequence[tuple[Path, Mapping[str, str], bool]], out: Path) -> str | None:
    """The table of the runs of (config, variables, whether it was started here), also written to
    `out`.txt, .csv and .png, or a line that says why there is none; None without a run.

    What an earlier suite left in the directory of a job that failed at once is not a result of
    this one.
    """
    from ssm_train.config import load_config, run_directory
    from ssm_train.record.report import report_runs

    found = []
    for config, environment, here in runs:
        try:
            run_dir = run_directory(load_config(config, environment=environment)[0], config)
        except InputError:  # the job's log says what is wrong with its config
            continue
        if (run_dir / MARKER).is_file() and (not here or was_started_with(run_dir, config)):
            found.append(run_dir)
    try:
        return report_runs(found, out) if found else None
    except InputError as error:  # the runs are what counts
        return f"no table: {error}"
