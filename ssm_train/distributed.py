"""Processes: the Accelerator, seeds, reductions, and one stop flag for all ranks.

The functions below work in one process and in many; nothing else in the package asks which.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssm_train.errors import InputError

Precision = Literal["bf16", "fp16", "fp32"]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """All ranks."""
    if dist.is_initialized():
        dist.barrier()


def reduce_sum(values: Tensor) -> Tensor:
    """All ranks. Sum over processes, on the device of `values`, without a host sync."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def reduce_max(values: Tensor) -> Tensor:
    """All ranks. Maximum over processes."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def reduce_sum_later(values: Tensor) -> Callable[[], list[float]]:
    """All ranks. Starts a sum over processes and its copy to the host; the result reads it.

    Read one step later, it waits neither for the other ranks nor for the device.
    """
    work = dist.all_reduce(values, async_op=True) if dist.is_initialized() else None
    if not values.is_cuda:

        def read() -> list[float]:
            if work is not None:
                work.wait()
            return values.tolist()

        return read

    if work is not None:
        work.wait()  # orders the copy after the reduction on the stream; the host goes on
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read_after_copy() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read_after_copy


def gather_objects(items: list[Any]) -> list[Any]:
    """All ranks. The lists of every rank, concatenated in rank order, on every rank."""
    if not dist.is_initialized():
        return items
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def main_first(work: Callable[[], Any]) -> Any:
    """All ranks. Runs `work` on rank 0 before the others, and returns its result on each."""
    if is_main():
        result = work()
        barrier()
        return result
    barrier()
    return work()


def seed_everything(seed: int) -> None:
    """Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def select_device(device: str) -> None:
    """Make "cuda:1" the only visible GPU, before CUDA starts."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {device!r} asked for, but torch sees no GPU; use device: cpu")
    if index:
        if torch.cuda.is_initialized():
            raise InputError(f"device: {device!r} must be chosen before CUDA is in use")
        os.environ["CUDA_VISIBLE_DEVICES"] = index


def build_accelerator(prec: Precision, device: str) -> Any:
    """The Accelerator of this process; `device` is "auto", "cpu", "cuda" or "cuda:1".

    Raises InputError when the number of processes is not the one that was launched: Accelerate
    can fall back to a single process without a word.
    """
    from accelerate import Accelerator

    select_device(device)
    accelerator = Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="fp16" if prec == "fp16" else "no",  # fp16: its gradient scaler
        step_scheduler_with_optimizer=False,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise InputError(
            f"{launched} processes were launched but Accelerate runs {accelerator.num_processes}; "
            "on CPU start with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        )
    if prec == "fp16" and accelerator.device.type == "cpu":
        raise InputError("prec: fp16 needs a GPU (loss scaling); use prec: bf16 or fp32 on a CPU")
    return accelerator


def autocast(prec: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Low-precision arithmetic for the forward pass; parameters stay as they are stored."""
    if prec == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if prec == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


class StopFlag:
    """Set by SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C; the ranks agree on it through the step's status.

    A second Ctrl-C interrupts at once. Use as a context: the old handlers come back at the end.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        for number in self.SIGNALS:
            self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None
