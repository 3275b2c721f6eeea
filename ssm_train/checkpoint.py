"""Checkpoints for resume that survive a kill at any point: what is in one, when it counts as whole.

Safetensors and JSON by parameter name, no pickle. A manifest with the hash of every file is written
last, then one rename makes the checkpoint appear.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssm_train.errors import InputError
from ssm_train.settings import Settings
from ssm_train.snapshot import collect_rng

MANIFEST = "manifest.json"
STATE = "state.json"
Group = Literal["trainable", "optimizer", "base"]


class CheckpointSettings(Settings):
    """How many checkpoints to keep."""

    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept besides the best one."""


@dataclass
class Checkpoint:
    """What a run needs to go on; tensors are on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # group -> name -> tensor
    state: dict[str, Any]
    rng: dict[str, Any] | None  # this rank's; None when fewer ranks wrote the checkpoint
    world_size: int  # processes that wrote it


def write_point(name: str) -> None:
    """Called after every write that a kill could separate from the next; fault tests replace it."""


def single_process() -> None:
    """The barrier of a run with one process."""


# ---------------------------------------------------------------- writing


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[Group, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = single_process,
) -> Path:
    """Writes `checkpoints/step-XXXXXXXX` of optimizer step `step`. All ranks.

    Rank 0 writes `tensors` (one file for each group that is not empty; other ranks may pass {})
    and `state` (JSON); every rank writes its own random states. Nothing counts before the rename.
    """
    final = checkpoint_path(run_dir, step)
    partial = final.with_name(final.name + ".tmp")
    if rank == 0:
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob("*.tmp"):
            remove(leftover)
        write_point("leftovers removed")
        partial.mkdir()
        write_point("directory made")
    barrier()
    write_json(partial / rng_name(rank), collect_rng())
    barrier()
    if rank == 0:
        for group, named in tensors.items():
            if named:
                write_tensors(partial / f"{group}.safetensors", named)
        write_json(partial / STATE, {**state, "step": step})
        write_manifest(partial, step, world_size)
        sync(partial)
        write_point("directory synced")
        publish(partial, final)
        write_pointer(run_dir, "last", step)
    barrier()
    return final


def publish(partial: Path, final: Path) -> None:
    """Renames a whole checkpoint to its final name; one that was there stays until then."""
    replaced = final.with_name(final.name + ".old")
    if final.exists():
        if replaced.exists():
            remove(replaced)
        final.rename(replaced)
        write_point("old one moved aside")
    partial.rename(final)
    write_point("renamed")
    sync(final.parent)
    write_point("rename synced")
    for old in final.parent.glob("step-*.old"):
        remove(old)


def write_manifest(directory: Path, step: int, world_size: int) -> None:
    """Size and SHA-256 of every file there, and the manifest's own digest."""
    missing = [r for r in range(world_size) if not (directory / rng_name(r)).exists()]
    if missing:
        raise InputError(
            f"checkpoint: rank 0 sees no file of ranks {missing} of {world_size} in {directory}; "
            "the run directory must be on a file system that all nodes share"
        )
    files = {
        path.name: {"size": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(directory.iterdir())
    }
    manifest = {"format": 1, "step": step, "world_size": world_size, "files": files}
    write_json(directory / MANIFEST, {**manifest, "sha256": own_digest(manifest)})


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory (tied weights, views of a flat buffer).
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    save_file(separate, path)
    write_point(f"{path.name} written")
    sync(path)
    write_point(f"{path.name} synced")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
    write_point(f"{path.name} written")
    sync(path)
    write_point(f"{path.name} synced")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small text file; a reader or a crash finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    write_point(f"{path.name} written")
    sync(partial)
    partial.replace(path)
    write_point(f"{path.name} renamed")
    sync(path.parent)


def sync(path: Path) -> None:
    """Asks the disk to have a file, or the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A file, a directory with what is in it, or a symbolic link and nothing behind it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


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
    except OSError:
        return f"{MANIFEST} is missing"
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
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if hashes and digest(file) != expected["sha256"]:
            return f"{name} does not match its SHA-256"
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
        rng=(
            json.loads((path / rng_name(rank)).read_text(encoding="utf-8"))
            if rng_name(rank) in names
            else None
        ),
        world_size=manifest["world_size"],
    )


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.fullmatch(r"step-(\d{8,18})\s*", text, re.ASCII)
    return int(match[1]) if match else None  # as of a file that is not there


def prune(run_dir: Path, keep: int, protect: Collection[int] = ()) -> list[Path]:
    """Removes all but the newest `keep` checkpoints and the steps in `protect`. Rank 0 only.

    Damaged ones do not count. The newest that verifies in full is never removed.
    """
    assert keep >= 1, keep
    kept: list[Path] = []
    doomed: list[Path] = []
    count = 0
    for step, path in list_checkpoints(run_dir):
        whole = find_damage(path, hashes=False) is None
        count += whole
        (kept if step in protect or (whole and count <= keep) else doomed).append(path)
    if doomed and not any(find_damage(path) is None for path in kept):
        spared = next((path for path in doomed if find_damage(path) is None), None)
        doomed = [path for path in doomed if path != spared] if spared else []
    for path in doomed:
        # A removal that is cut short leaves a name that nobody takes for a checkpoint.
        leftover = path.rename(path.with_name(path.name + ".tmp"))
        write_point("pruned one renamed")
        remove(leftover)
    return doomed
