"""How a run was made: versions, hardware, source and command of its process, as written down in
`environment.json`, read again and compared."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssm_train.doctor import version_of
from ssm_train.errors import InputError
from ssm_train.overrides import DIRECTORIES, ENVIRONMENT
from ssm_train.secrets import redact, redact_command

FACTS_FILE = "environment.json"
PACKAGES = [
    "ssm_train", "torch", "triton", "transformers", "peft", "accelerate", "datasets",
    "safetensors", "tokenizers", "numpy", "flash-linear-attention", "mamba-ssm", "causal-conv1d",
    "deepspeed",
]  # fmt: skip
# Of environment.json, besides the packages: what a run that is repeated is compared in.
FACTS = [
    "python", "platform", "cpu", "threads", "gpus", "cuda", "driver", "git", "engine", "processes",
    "device", "data",
]  # fmt: skip
# Environment variables that change a run, besides those that stand for a key of the config.
# Nothing else of the environment is ever written down.
RECORDED_VARIABLES = [
    "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE",
    "LOCAL_RANK", "OMP_NUM_THREADS", "RANK", "SLURM_JOB_ID", "SLURM_NNODES", "WORLD_SIZE",
]  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Versions, hardware, source revision and command of this process."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cpu": read_cpu(Path("/proc/cpuinfo")),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "driver": read_driver(Path("/proc/driver/nvidia/version")),
        "packages": {package: version_of(package) for package in PACKAGES},
        "git": describe_source(),
        "command": redact_command(sys.argv),
        "environment": {
            name: redact(os.environ[name])
            for name in sorted({*RECORDED_VARIABLES, *ENVIRONMENT, *DIRECTORIES} & set(os.environ))
        },
    }


def read_driver(file: Path) -> str | None:
    """The version of NVIDIA's driver, from what its kernel module says; None without one."""
    try:
        found = re.search(r"NVRM version:.*?\s(\d+\.[\d.]+)\s", file.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def read_cpu(file: Path) -> str:
    """The model of the processor, as far as the system says it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", file.read_text(encoding="utf-8"), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def read_environment(run_dir: Path) -> dict[str, Any]:
    """What `describe_environment` and the run wrote down."""
    path = run_dir / FACTS_FILE
    if not path.is_file():
        raise InputError(f"{run_dir} has no {FACTS_FILE}, the record of how it was made")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record["packages"], dict):
            return dict(record)
    except (ValueError, RecursionError, KeyError, TypeError):
        pass
    raise InputError(f"{path} is not what a run wrote; remove it to go on without")


@dataclass(frozen=True)
class Resumption:
    """A start that goes on with a run."""

    step: int  # that it goes on from
    changed: list[str]  # in words: what is other than before


def list_resumptions(
    run_dir: Path, facts: Mapping[str, Any], now: Resumption
) -> list[dict[str, Any]]:
    """All of a run so far, for its record, and the one that begins now with these facts."""
    if not (run_dir / FACTS_FILE).is_file():
        return [asdict(now)]
    before = read_environment(run_dir)
    changed = [*now.changed, *differing_facts(before, facts)]
    return [*before.get("resumed", []), {"step": now.step, "changed": changed}]


def describe_resumptions(record: Mapping[str, Any]) -> list[str]:
    """A line for each that changed something: what follows is of two runs, so to say."""
    return [
        f"resumed at step {one['step']} with other values: {'; '.join(one['changed'])}"
        for one in record.get("resumed", [])
        if one["changed"]
    ]


def differing_facts(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each fact that changes what a run computes and is not as recorded."""
    then, here = (
        {key: facts.get(key) for key in FACTS} | facts["packages"] for facts in (record, now)
    )
    recorded = {*record, *record["packages"]}
    return [
        f"{key}: {json.dumps(then.get(key))} in the record, {json.dumps(here.get(key))} now"
        if key in recorded
        else f"{key}: not in the record"
        for key in {**then, **here}
        if then.get(key) != here.get(key)
    ]


def describe_source() -> dict[str, Any] | None:
    """Commit of the package's own checkout and whether it was changed; None outside git."""
    package = Path(__file__).parents[1]
    git = ["git", "-C", str(package)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "."], capture_output=True, text=True
        )
    except FileNotFoundError:  # no git on this machine
        return None
    if commit.returncode:
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}
