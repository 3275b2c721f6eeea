"""Where jobs run side by side: the GPUs of this machine or those asked for, and how many jobs each
of them takes. Without a GPU there is one slot on the CPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from ssm_train.errors import InputError, whole_number

CPU = "CPU"
GPU_ID = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")
DETECTION_SECONDS = 60
MOST_JOBS = 64  # on one GPU: a number of another magnitude is a slip


@dataclass(frozen=True)
class Slots:
    """The GPUs (none: the CPU) and how many jobs run on each at once."""

    gpus: tuple[str, ...]
    plan: tuple[int, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each slot: a GPU's id, or "CPU"."""
        pairs = zip(self.gpus or (CPU,), self.plan, strict=True)
        return tuple(device for device, jobs in pairs for _ in range(jobs))


def plan_slots(environment: Mapping[str, str]) -> Slots:
    """The slots that GPU_IDS, CUDA_VISIBLE_DEVICES and GPU_PLAN ask for. Raises InputError."""
    gpus = find_gpus(environment)
    return Slots(gpus, parse_plan(environment.get("GPU_PLAN", ""), gpus))


def find_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Ids from GPU_IDS, else CUDA_VISIBLE_DEVICES (empty: none), else what `nvidia-smi` lists."""
    if asked := split_list(environment.get("GPU_IDS", "")):
        for gpu in asked:
            if not GPU_ID.fullmatch(gpu):
                raise InputError(
                    f"GPU_IDS: {gpu!r} is not the id of a GPU; give ids such as GPU_IDS='0 1'"
                )
        return asked
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(takewhile(GPU_ID.fullmatch, split_list(visible)))  # CUDA stops there too
    return detect_gpus()


def detect_gpus() -> tuple[str, ...]:
    """Ids of `nvidia-smi -L`; none without that program. A driver that fails is said aloud."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        listed = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=DETECTION_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"nvidia-smi -L did not answer in {DETECTION_SECONDS} s; set GPU_IDS, or "
            "CUDA_VISIBLE_DEVICES= for the CPU"
        ) from None
    if listed.returncode:
        reason = (listed.stdout + listed.stderr).strip().partition("\n")[0]
        sys.stderr.write(f"no GPU: nvidia-smi -L failed ({reason}); running on the CPU\n")
        return ()
    return tuple(re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE))


def parse_plan(text: str, gpus: tuple[str, ...]) -> tuple[int, ...]:
    """Jobs on each GPU (on the CPU, where there is none) from GPU_PLAN: one number for all, or one
    for each; nothing means 1. Raises InputError."""
    devices = gpus or (CPU,)
    words = split_list(text) or ("1",)
    plan: tuple[int, ...] = ()
    for word in words:
        jobs = whole_number(word)
        if jobs is None or jobs > MOST_JOBS:
            raise InputError(
                f"GPU_PLAN: {word!r} is not a number of jobs; give whole numbers from 0 to "
                f"{MOST_JOBS}"
            )
        plan += (jobs,)
    if len(plan) == 1:
        plan *= len(devices)
    if len(plan) != len(devices):
        raise InputError(
            f"GPU_PLAN: {len(plan)} numbers ({' '.join(words)}) for {len(devices)} "
            f"{'GPUs' if gpus else 'device'} ({' '.join(devices)}); give one number for all, or "
            "one for each"
        )
    if not any(plan):
        raise InputError(
            f"GPU_PLAN: {' '.join(words)} leaves no slot; at least one number must be above 0"
        )
    return plan


def split_list(text: str) -> tuple[str, ...]:
    """Words between spaces or commas."""
    return tuple(word for word in re.split(r"[\s,]+", text) if word)
