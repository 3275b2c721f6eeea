"""The run directory: who may use it, and the names of what a run leaves there.

`cfg.yaml` (the resolved config) marks a directory as ours; only such a directory is ever removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssm_train.durable import remove, write_atomically, writing
from ssm_train.errors import InputError
from ssm_train.record.environment import (
    FACTS_FILE,
    Resumption,
    describe_environment,
    list_resumptions,
    read_environment,
)
from ssm_train.strict_yaml import read_document

MARKER = "cfg.yaml"
RESULT = "result.json"  # how the run ended; summary.py writes it
WARMUP = "warmup"  # a method's first stage, and the directory of a run that has what it wrote
PEFT = "peft.json"  # the PEFT settings with all overrides: what `peft` names may change later


def check_run_directory(run_dir: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuses a directory that is in use or not ours, before anything is loaded or written."""
    if overwrite and resume:
        raise InputError("overwrite and resume exclude each other; choose one")
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run directory {run_dir} is a file; move it or set output_root")
    marked = (run_dir / MARKER).exists()
    for name in (MARKER, "checkpoints", WARMUP):
        if (run_dir / name).is_symlink():
            raise InputError(
                f"{run_dir / name} is a symbolic link: what is behind it would be written and "
                "removed; put the files there, or link output_root itself"
            )
    if resume and marked and "name" not in read_document(run_dir / MARKER).values:
        raise InputError(
            f"--resume: {run_dir} holds a run of another program ({MARKER} has no name), whose "
            "checkpoints are not read here; use --overwrite to start again, or set output_root"
        )
    if run_dir.is_dir() and any(run_dir.iterdir()):
        if not marked:
            raise InputError(
                f"run directory {run_dir} holds files but no run ({MARKER} is missing); "
                "move them or set output_root"
            )
        if not (overwrite or resume):
            raise InputError(
                f"run directory {run_dir} already holds a run; "
                "use --resume to go on, --overwrite to start again, or set output_root"
            )
    existing = next(p for p in (run_dir, *run_dir.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"cannot write to {existing}, where {run_dir} would be; set output_root")


def create_run_directory(
    run_dir: Path,
    config_yaml: str,
    *,
    overwrite: bool,
    new: bool = False,
    resumed: Resumption | None = None,
    **facts: Any,
) -> None:
    """Rank 0. Makes the directory with its marker; with `overwrite` an old run is removed first.
    `facts` go into `environment.json`, too, and where the run was `resumed`.

    Of a run that goes on, the end that it had before is no longer its end. `new`: raises
    InputError where another process has made the directory since it was checked.
    """
    marker = run_dir / MARKER
    if overwrite and marker.exists():
        if run_dir.is_symlink():
            raise InputError(
                f"run directory {run_dir} is a symbolic link; --overwrite removes none"
            )
        for path in run_dir.iterdir():
            if path != marker:  # a removal that is cut short leaves a run, which may be removed
                remove(path)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / RESULT).unlink(missing_ok=True)
    if new:
        create_marker(marker, config_yaml)
    else:
        write_atomically(marker, config_yaml)
    facts = describe_environment() | facts
    if resumed:
        facts["resumed"] = list_resumptions(run_dir, facts, resumed)
    write_atomically(run_dir / FACTS_FILE, json.dumps(facts, indent=2) + "\n")


def create_marker(marker: Path, config_yaml: str) -> None:
    """Raises InputError where there is one: of two processes one makes it."""
    try:
        with writing(marker), marker.open("x", encoding="utf-8") as file:
            file.write(config_yaml)
    except FileExistsError:
        raise InputError(
            f"run directory {marker.parent}: another process has started this run meanwhile; wait "
            "for it, or choose another name"
        ) from None
    except OSError:
        marker.unlink(missing_ok=True)
        raise


def record_peft(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Rank 0. Writes down the PEFT settings that a run is trained with."""
    write_atomically(run_dir / PEFT, json.dumps(settings, indent=2) + "\n")


def recorded_peft(run_dir: Path) -> dict[str, Any] | None:
    """The PEFT settings that a run was trained with; None where none were written down."""
    path = run_dir / PEFT
    return read_document(path).values if path.is_file() else None


def check_peft(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Raises InputError naming a setting that is not as when the run began."""
    began, now = recorded_peft(run_dir), json.loads(json.dumps(settings))
    if began is None or began == now:
        return
    key = next(key for key in {**now, **began} if began.get(key) != now.get(key))
    old, new = (repr(s[key]) if key in s else "the default" for s in (began, now))
    raise InputError(
        f"--resume: {key} of the PEFT config was {old} when the run began and is {new} now; "
        "put it back, or start a new run for it"
    )


def check_same_data(run_dir: Path, data: Mapping[str, Any]) -> None:
    """Raises InputError where the training data are not those that the run began with."""
    if not (run_dir / FACTS_FILE).is_file():
        return
    began = read_environment(run_dir).get("data")
    if began in (None, data):
        return
    counts = [
        f"{d.get('examples'):,} examples of {d.get('tokens'):,} tokens" for d in (began, data)
    ]
    raise InputError(
        f"--resume: the training data were {counts[0]} when the run began and are others now, "
        f"{counts[1]}; put them back, or start a new run for them"
    )
