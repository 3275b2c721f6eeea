"""Files of kernel choices: the package's, one a GPU model, and a user's own, which win entry by
entry."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Key = tuple[Any, ...]
"""What Triton tunes by: sizes, flags and dtypes."""
Entries = dict[Key, dict[str, Any]]
"""Of one kernel: key -> configuration, both as JSON keeps them."""
Choices = dict[str, Entries]
"""By module and name of the kernel."""

SHIPPED = Path(__file__).parent / "tuned"
LIBRARIES = ("triton", "torch", "flash-linear-attention", "mamba-ssm")


@dataclass(frozen=True)
class Gpu:
    """A GPU model."""

    name: str
    capability: str
    """Compute capability, such as "9.0"."""

    @classmethod
    def at(cls, device: str | torch.device) -> Gpu:
        major, minor = torch.cuda.get_device_capability(device)
        return cls(torch.cuda.get_device_name(device), f"{major}.{minor}")

    @property
    def file_name(self) -> str:
        return re.sub(r"[^0-9A-Za-z]+", "_", self.name).strip("_") + ".json"

    @property
    def user_file(self) -> Path:
        """Where `ssm-train warmup` writes; wins over what is shipped."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "ssm_train" / "tuned" / self.file_name

    def shipped_file(self) -> Path | None:
        """The package's file for this GPU, else one for a GPU of the same capability."""
        if (own := SHIPPED / self.file_name).is_file():
            return own
        files = sorted(SHIPPED.glob("*.json"))
        return next((f for f in files if header(f)["capability"] == self.capability), None)


def load(gpu: Gpu) -> tuple[Choices, list[str]]:
    """The user's choices over the shipped ones, entry by entry, and where they come from."""
    choices: Choices = {}
    sources = []
    if gpu.user_file.is_file():
        try:
            choices = read(gpu.user_file)
            sources.append(str(gpu.user_file))
        except (OSError, ValueError, TypeError, KeyError) as error:
            sources.append(f"{gpu.user_file} cannot be read ({type(error).__name__})")
    if (shipped := gpu.shipped_file()) is not None:
        for name, entries in read(shipped).items():
            choices[name] = entries | choices.get(name, {})
        same = shipped.name == gpu.file_name
        other = "" if same else f" for {header(shipped)['gpu']}, also of {gpu.capability}"
        sources.append(f"shipped{other}")
    return choices, sources


def header(path: Path) -> dict[str, Any]:
    """All of a file, as JSON: `gpu`, `capability`, `versions`, `kernels`."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def read(path: Path) -> Choices:
    """The choices of a file."""
    return {
        name: {tuple(entry["key"]): entry["config"] for entry in entries}
        for name, entries in header(path)["kernels"].items()
    }


def write(path: Path, gpu: Gpu, choices: Choices) -> None:
    """Lays the choices over those of the file, in one rename."""
    merged = read(path) if path.is_file() else {}
    for name, entries in choices.items():
        merged[name] = merged.get(name, {}) | entries
    content = {
        "gpu": gpu.name,
        "capability": gpu.capability,
        "versions": {name: v for name in LIBRARIES if (v := version_of(name))},
        "kernels": {
            name: [{"key": list(key), "config": config} for key, config in entries.items()]
            for name, entries in sorted(merged.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(f".{os.getpid()}.tmp")
    partial_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial_file, path)


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
