"""Checkpoints for resume that survive a kill at any point: what is in one, when it counts as whole.

Safetensors and JSON by parameter name, no pickle. A manifest with the hash of every file is written
last, then one rename makes the checkpoint appear.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssm_train.durable import (
    digest,
    remove,
    remove_if_possible,
    rename,
    sync,
    write_atomically,
    write_json,
    write_point,
    write_tensors,
)
from ssm_train.errors import InputError
from ssm_train.settings import Settings

MANIFEST = "manifest.json"
STATE = "state.json"
UNREADABLE = "cannot be read"
"""In the words of `find_damage` for what may pass: an error of the disk, or of permissions."""
Group = Literal["trainable", "optimizer", "base"]


class CheckpointSettings(Settings):
    """How checkpoints are written, and how many are kept."""

    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept besides the best one."""
    async_save: bool = False
    """Train on while a checkpoint is written, from a copy in memory that is kept for the next."""
    save_errors: Literal["stop", "continue"] = "stop"
    """What follows where a checkpoint cannot be written, as on a full disk: the run stops, or it
    warns and tries again at the next one."""


@dataclass
class Checkpoint:
    """What a run needs to go on; tensors are on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # group -> name -> tensor
    state: dict[str, Any]
    rng: dict[str, Any] | None  # this rank's; None when fewer ranks wrote the checkpoint
    world_size: int  # processes that wrote it


# ---------------------------------------------------------------- writing


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[Group, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    rngs: Sequence[Mapping[str, Any]],
) -> Path:
    """Rank 0. Writes `checkpoints/step-XXXXXXXX` of optimizer step `step`.

    One file for each group of `tensors` that is not empty, `state`, and the random states of every
    rank. Nothing counts before the rename; where writing fails, nothing stays.
    """
    final = checkpoint_path(run_dir, step)
    partial = final.with_name(final.name + ".tmp")
    final.parent.mkdir(parents=True, exist_ok=True)
    write_point("checkpoints made")
    for leftover in final.parent.glob("*.tmp"):
        remove_if_possible(leftover)
    write_point("leftovers removed")
    try:
        partial.mkdir()
        write_point("directory made")
        for rank, rng in enumerate(rngs):
            write_json(partial / rng_name(rank), rng)
        for group, named in tensors.items():
            if named:
                write_tensors(partial / f"{group}.safetensors", named)
        write_json(partial / STATE, {**state, "step": step})
        write_manifest(partial, step, len(rngs))
        sync(partial)
        write_point("directory synced")
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    publish(partial, final)
    write_pointer(run_dir, "last", step)
    return final


def publish(partial: Path, final: Path) -> None:
    """Renames a whole checkpoint to its final name; one that was there stays until then."""
    replaced = final.with_name(final.name + ".old")
    if final.exists():
        if replaced.exists():
            remove(replaced)
        rename(final, replaced)
        write_point("old one moved aside")
    rename(partial, final)
    write_point("renamed")
    sync(final.parent)
    write_point("rename synced")
    for old in final.parent.glob("step-*.old"):
        remove_if_possible(old)
        write_point("old one removed")


def write_manifest(directory: Path, step: int, world_size: int) -> None:
    """Size and SHA-256 of every file there, and the manifest's own digest."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(directory.iterdir())
    }
    manifest = {"format": 1, "step": step, "world_size": world_size, "files": files}
    write_json(directory / MANIFEST, {**manifest, "sha256": own_digest(manifest)})


# ---------------------------------------------------------------- finding and reading


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def rng_name(rank: int) -> str:
    return f"rng-{rank:05d}.json"


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, path), newest first, unverified.

    `step-X.old` is a checkpoint that a crash left while the same step was written again.
    """
    directory = Path(run_dir) / "checkpoints"
    if not directory.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in directory.iterdir()
        if (match := re.fullmatch(r"step-(\d{8,18})(\.old)?", path.name, re.ASCII))
        and path.is_dir()
    ]
    return sorted(found, key=lambda item: (-item[0], item[1].name))


def latest_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    skipped: list[str] = []
    for _, path in list_checkpoints(run_dir):
        damage = find_damage(path)
        if damage is None:
            return path, skipped
        skipped.append(f"{path.name}: {damage}")
    return None, skipped


def find_damage(path: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None. Without `hashes` only names and sizes are read."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} {UNREADABLE} ({error.strerror})"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is not JSON"
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != own_digest(manifest):
        return f"{MANIFEST} does not match its own digest"
    if not describes_files(manifest):
        return f"{MANIFEST} does not describe the files of a checkpoint"
    if path.name.removesuffix(".old") != f"step-{manifest['step']:08d}":
        return f"{MANIFEST} is of step {manifest['step']}"
    for name, expected in manifest["files"].items():
        file = path / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if (size := file.stat().st_size) != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
            if hashes and digest(file) != expected["sha256"]:
                return f"{name} does not match its SHA-256"
        except OSError as error:
            return f"{name} {UNREADABLE} ({error.strerror})"
    return None


def describes_files(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest says what it should, of files in its own directory alone."""
    files = manifest.get("files")
    return (
        all(isinstance(manifest.get(key), int) for key in ("step", "world_size"))
        and isinstance(files, dict)
        and all(
            Path(name).name == name and isinstance(entry, dict) and {"size", "sha256"} <= set(entry)
            for name, entry in files.items()
        )
    )


def load_checkpoint(path: Path, *, rank: int = 0, verify: bool = True) -> Checkpoint:
    """Reads a checkpoint; InputError when it is damaged.

    `verify=False` spares a second hashing of what `latest_checkpoint` returned.
    """
    path = Path(path)
    if verify and (damage := find_damage(path)):
        raise InputError(f"checkpoint {path}: {damage}; resume from another one")
    try:
        return read_checkpoint(path, rank)
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise InputError(
            f"checkpoint {path}: it cannot be read ({error}); resume from another one"
        ) from None


def read_checkpoint(path: Path, rank: int) -> Checkpoint:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    names = manifest["files"]
    return Checkpoint(
        step=manifest["step"],
        tensors={
            name.removesuffix(".safetensors"): load_file(path / name)
            for name in names
            if name.endswith(".safetensors")
        },
        state=json.loads((path / STATE).read_text(encoding="utf-8")),
        rng=read_rng(path, rank) if rng_name(rank) in names else None,
        world_size=manifest["world_size"],
    )


def read_rng(path: Path, rank: int) -> dict[str, Any]:
    """Random states of one of the ranks that saved it, by library."""
    states: dict[str, Any] = json.loads((path / rng_name(rank)).read_text(encoding="utf-8"))
    return states


def own_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- keeping


def write_pointer(run_dir: Path, name: Literal["best", "last"], step: int) -> None:
    """`checkpoints/best` or `checkpoints/last`: a text file with the name of a checkpoint."""
    path = checkpoint_path(run_dir, step)
    write_atomically(path.with_name(name), path.name + "\n")


def read_pointer(run_dir: Path, name: Literal["best", "last"]) -> int | None:
    """The step that `checkpoints/best` or `checkpoints/last` names; None where it names none."""
    path = Path(run_dir) / "checkpoints" / name
    if not path.is_file():
        return None
    found = re.fullmatch(rb"step-(\d{8,18})\s*", path.read_bytes())
    return int(found[1]) if found else None  # as of a file that is not there


def prune(run_dir: Path, keep: int, protect: Collection[int] = ()) -> list[Path]:
    """Removes all but the newest `keep` checkpoints and the steps in `protect`. Rank 0 only.

    Damaged ones do not count. The newest that verifies in full is never removed, and nothing where
    none does: perhaps the disk cannot be read. Raises OSError, after all others are removed, where
    one cannot be.
    """
    assert keep >= 1, keep
    failure: OSError | None = None
    found = list_checkpoints(run_dir)
    doomed: list[Path] = []
    count = 0
    for step, path in found:
        whole = find_damage(path, hashes=False) is None
        count += whole
        if step not in protect and not (whole and count <= keep):
            doomed.append(path)
    if doomed:
        newest = next((path for _, path in found if find_damage(path) is None), None)
        doomed = [path for path in doomed if path != newest] if newest else []
    for path in doomed:
        # A removal that is cut short leaves a name that nobody takes for a checkpoint.
        leftover = path.with_name(path.name + ".tmp")
        try:
            rename(path, leftover)
            write_point("pruned one renamed")
            remove(leftover)
        except OSError as error:
            failure = failure or error
            continue
        write_point("pruned one removed")
    if failure:
        raise failure
    return doomed
