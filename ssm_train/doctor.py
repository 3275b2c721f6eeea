"""What this machine can run: versions, devices, the kernel of each operation, and what is missing.

Nothing here may fail because a package is absent or broken: that is what it reports.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from ssm_train import __version__

REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")
# Distribution -> what it is for, how to install it.
OPTIONAL = {
    "triton": ("kernels on NVIDIA GPUs; imported by GLA", "pip install triton"),
    "flash-linear-attention": ("the GLA family", "pip install 'flash-linear-attention>=0.6,<0.7'"),
    "deepspeed": ("ZeRO-1, 2 and 3", "DS_BUILD_OPS=0 pip install -e '.[deepspeed]'"),
    "mamba-ssm": ("fast scans of Mamba-2 on a GPU", "pip install -e '.[mamba]'"),
    "causal-conv1d": ("needed by mamba-ssm for its own models", "pip install -e '.[mamba]'"),
    "tensorboard": ("trackers: [tensorboard]", "pip install tensorboard"),
    "wandb": ("trackers: [wandb]", "pip install wandb"),
    "trackio": ("trackers: [trackio]", "pip install trackio"),
    "swanlab": ("trackers: [swanlab]", "pip install swanlab"),
}


@dataclass(frozen=True)
class Package:
    """An installed or missing distribution."""

    name: str
    version: str | None
    purpose: str
    install: str | None
    """The line that installs it, when it is missing."""


@dataclass(frozen=True)
class Kernel:
    """Which implementation an operation of a model family uses here."""

    family: str
    operation: str
    implementation: str | None
    """None: the family cannot run here."""
    reason: str
    """Why not a faster one, or why none; empty when it is the fastest there is."""


def examine() -> dict[str, Any]:
    """Everything, as JSON-able data: `packages`, `devices`, `kernels`."""
    devices = examine_devices()
    return {
        "ssm_train": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices,
        "packages": [asdict(package) for package in examine_packages()],
        "kernels": [asdict(kernel) for kernel in examine_kernels(devices)],
    }


def examine_packages() -> list[Package]:
    """Versions of what is required and of what is optional."""
    required = [
        Package(name, found := version_of(name), "required", None if found else "pip install -e .")
        for name in REQUIRED
    ]
    optional = [
        Package(name, found := version_of(name), purpose, None if found else install)
        for name, (purpose, install) in OPTIONAL.items()
    ]
    return required + optional


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def import_problem(module: str) -> str | None:
    """Why a module cannot be imported, or None. Packages with compiled parts raise anything."""
    try:
        importlib.import_module(module)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


def examine_devices() -> dict[str, Any]:
    """CPU threads and GPUs as torch sees them; `problem` says why there is no GPU to use."""
    found: dict[str, Any] = {"cpus": os.cpu_count(), "threads": None, "gpus": [], "problem": None}
    if problem := import_problem("torch"):
        return found | {"problem": f"torch cannot be imported ({problem}); pip install -e ."}
    import torch

    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            capability = f"{about.major}.{about.minor}"
            gib = round(about.total_memory / 2**30, 1)
            found["gpus"].append({"name": about.name, "memory_gib": gib, "capability": capability})
    elif shutil.which("nvidia-smi") is None:
        found["problem"] = "no NVIDIA GPU"
    elif torch.version.cuda is None:
        found["problem"] = (
            "this torch is built without CUDA; pytorch.org/get-started says how to install one"
        )
    else:
        found["problem"] = "torch sees no GPU; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return found


def examine_kernels(devices: dict[str, Any]) -> list[Kernel]:
    """One entry per operation of every model family."""
    if problem := import_problem("ssm_train.adapters.registry"):
        return [Kernel("all", "all", None, problem)]
    from ssm_train.adapters.registry import FAMILIES

    device = "cuda" if devices["gpus"] else "cpu"
    return [kernel for family in FAMILIES for kernel in kernels_of(family, device, devices)]


def kernels_of(family: str, device: str, devices: dict[str, Any]) -> list[Kernel]:
    """The family's own choice for this device, explained."""
    from ssm_train.adapters.registry import FAMILIES

    try:
        adapter, _ = FAMILIES[family]()
        chosen = adapter.choose_kernels("auto", device)
    except Exception as error:  # a missing or broken package of this family
        return [Kernel(family, "all", None, str(error).splitlines()[0])]
    return [
        Kernel(family, operation, None, problem)
        if (problem := import_problem_of(implementation))
        else Kernel(family, operation, implementation, reason_for(implementation, devices))
        for operation, implementation in chosen.items()
    ]


def import_problem_of(implementation: str) -> str | None:
    """Why an installed mamba_ssm cannot be used, and what to do; None for all other kernels."""
    from ssm_train.adapters.ssd_triton import REPAIR, SSD

    problem = import_problem(SSD) if implementation == "mamba_ssm (Triton)" else None
    return problem and f"mamba_ssm is installed but broken ({problem}); {REPAIR}"


def reason_for(implementation: str, devices: dict[str, Any]) -> str:
    """Why not a faster one."""
    if implementation != "reference":
        return ""
    if devices["gpus"]:  # only the SSD has none of ours
        return "plain PyTorch: mamba_ssm is faster, pip install -e '.[mamba]'"
    return f"plain PyTorch: {devices['problem']}"


def show(findings: dict[str, Any]) -> None:
    """Prints the findings as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    devices = findings["devices"]
    console.print(
        f"ssm_train {findings['ssm_train']}, Python {findings['python']} on {findings['platform']}",
        markup=False,
    )
    console.print(f"CPU: {devices['cpus']} cores, {devices['threads']} threads in torch")
    for i, gpu in enumerate(devices["gpus"]):
        console.print(
            f"GPU {i}: {gpu['name']}, {gpu['memory_gib']} GiB, compute {gpu['capability']}",
            markup=False,
        )
    if devices["problem"]:
        console.print(f"GPU: {devices['problem']}", markup=False)

    packages = Table("package", "version", "for", "install", title="Packages")
    for package in findings["packages"]:
        packages.add_row(
            package["name"],
            package["version"] or "missing",
            escape(package["purpose"]),
            escape(package["install"] or ""),
        )
    console.print(packages)

    kernels = Table("family", "operation", "kernel", "why not a faster one", title="Kernels")
    for kernel in findings["kernels"]:
        kernels.add_row(
            kernel["family"],
            kernel["operation"],
            escape(kernel["implementation"] or "cannot run"),
            escape(kernel["reason"]),
        )
    console.print(kernels)
