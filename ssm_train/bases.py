"""A base that another run makes, or that lies in a directory: where it is, that it stays what the
run was trained on, and which process may train it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from ssm_train import distributed
from ssm_train.config import RunConfig, as_recorded, load_config, run_directory
from ssm_train.durable import digest, write_atomically
from ssm_train.errors import InputError
from ssm_train.explain import Provenance
from ssm_train.lock import InUse, own
from ssm_train.overrides import DIRECTORIES
from ssm_train.record import MARKER
from ssm_train.strict_yaml import read_document
from ssm_train.terminal import say

RECORD = "base.json"  # of a run directory: the base's directory and the hashes of its weights
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
LAUNCH = {
    "device", "lock", "num_data_workers", "output_root", "data_root", "cache_dir", "trackers",
    "resume", "overwrite",
}  # fmt: skip
"""Keys that say how and where a run is launched, not what it trains."""


def load_base_config(model: str) -> tuple[RunConfig, Provenance]:
    """The run config that `model` names; of the environment only the directories count."""
    return load_config(model, environment={k: v for k, v in os.environ.items() if k in DIRECTORIES})


def base_run(cfg: RunConfig) -> Path | None:
    """The directory of the run whose result is the model, where `model` is a run config."""
    if cfg.model is None or Path(cfg.model).suffix not in (".yaml", ".yml"):
        return None
    return run_directory(load_base_config(cfg.model)[0], cfg.model)


def differing_keys(recorded: RunConfig, asked: RunConfig) -> list[str]:
    """Keys in which the config of a run and the one that is asked for train something else."""
    a, b = (c.model_dump(exclude=LAUNCH) for c in (recorded, as_recorded(asked, recorded)))
    return [key for key in a if a[key] != b[key]]


def find_base(run_dir: Path, base_cfg: RunConfig, source: str) -> Literal["none", "begun", "done"]:
    """All ranks: what rank 0 finds of that base in the directory.

    An unfinished one of another config counts as none. Raises InputError for a finished one:
    adapters may stand on it.
    """
    marker = run_dir / MARKER
    found: Literal["none", "begun", "done"] = "none"
    changed: list[str] = []
    if marker.is_file():
        changed = differing_keys(load_config(marker)[0], base_cfg)
        if (run_dir / "model" / "config.json").is_file():
            found = "done"
        elif not changed:
            found = "begun"
    found, changed = distributed.gather_objects([(found, changed)])[0]
    if found == "done" and changed:
        raise InputError(
            f"model: {source} differs in {', '.join(changed)} from the base in {run_dir}; "
            "give the new base another name, or remove that directory"
        )
    return found


@contextmanager
def own_when_free(run_dir: Path) -> Iterator[None]:
    """All ranks. Rank 0 owns the directory, once no other process does; says once that it waits.

    Every rank asks rank 0 each second, so that no collective times out in a long wait.
    """
    said = False
    with ExitStack() as stack:
        while True:
            refusal = None
            if distributed.is_main():
                try:
                    stack.enter_context(own(run_dir))
                except InUse as error:
                    refusal = str(error)
            refusal = distributed.gather_objects([refusal])[0]
            if refusal is None:
                break
            if distributed.is_main() and not said:
                say(f"waiting for the base {run_dir}: {refusal}")
            said = True
            time.sleep(1)
        yield


def hash_weights(base: Path) -> dict[str, str]:
    """File name -> SHA-256 of each weights file of a model's directory."""
    files = sorted(path for pattern in WEIGHTS for path in base.glob(pattern))
    return {path.name: digest(path) for path in files}


def record_base(run_dir: Path, base: str) -> None:
    """Rank 0. Writes down which weights a run starts from; nothing for a hub id, which has a
    revision."""
    directory = Path(base).expanduser()
    if directory.is_dir():
        values = {"directory": str(directory.resolve()), "sha256": hash_weights(directory)}
        write_atomically(run_dir / RECORD, json.dumps(values, indent=2) + "\n")


def recorded_base(run_dir: Path) -> str | None:
    """The directory of a run's base, right from any working directory; None where it is gone or
    was never written down."""
    path = run_dir / RECORD
    if not path.is_file():
        return None
    directory = read_record(path)["directory"]
    return directory if Path(directory).is_dir() else None


def read_record(path: Path) -> dict[str, Any]:
    """Raises InputError for a file that `record_base` did not write."""
    values = read_document(path).values
    if not (isinstance(values.get("directory"), str) and isinstance(values.get("sha256"), dict)):
        raise InputError(f"{path} does not say which base the run stands on; put it back")
    return values


def check_base(run_dir: Path, base: str) -> None:
    """Raises InputError unless the weights are those that the run was trained on."""
    path = run_dir / RECORD
    if not path.is_file():
        return
    expected = read_record(path)["sha256"]
    found = hash_weights(Path(base).expanduser())
    if found == expected:
        return
    name = next(n for n in sorted(expected | found) if expected.get(n) != found.get(n))
    raise InputError(
        f"model: {name} in {base} has SHA-256 {found.get(name, 'none')[:12]}, but {run_dir} was "
        f"trained on {expected.get(name, 'none')[:12]}; put those weights back, or train this run "
        "again with --overwrite"
    )
