"""Processes: the Accelerator, seeds, reductions.

The functions below work in one process and in many; nothing else in the package asks which.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ssm_train.errors import InputError, whole_number

T = TypeVar("T")
Precision = Literal["bf16", "fp16", "fp32"]
SECONDS_BETWEEN_QUESTIONS = 1.0
ENGINES = ("NO", "MULTI_CPU", "MULTI_GPU")
"""Accelerate's distributed types that we build on."""
ENGINE_VARIABLES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
"""Which engine was asked for; `engines` builds it on Accelerate's plain processes. Accelerate would
run plain DDP, or nothing, where it has no way to run it on a CPU."""


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


def work_once(work: Callable[[], None]) -> None:
    """All ranks. One process a node works: rank 0, then one of every other node, which finds what
    is there already if the nodes share a disk. The others wait, however long it takes, and all
    fail where one fails."""
    if not dist.is_initialized():
        work()
        return
    work_together(work if is_main() else None)
    work_together(work if leads_node() and not is_main() else None)


def ask_nodes(question: Callable[[], T]) -> list[T]:
    """All ranks. The answers of one process a node, rank 0's first, to everyone."""
    if not dist.is_initialized():
        return [question()]
    answers: list[T] = []
    work_together((lambda: answers.append(question())) if leads_node() else None)
    return gather_objects(answers)


def leads_node() -> bool:
    return is_main() or os.environ.get("LOCAL_RANK", "0") == "0"


def work_together(work: Callable[[], None] | None) -> None:
    """All ranks, each with its work or none. They ask each other every now and then, so that no
    collective times out."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work) if work is not None else None
        while True:
            if future is not None:
                wait([future], timeout=SECONDS_BETWEEN_QUESTIONS)
            done = future is None or future.done()
            failure = future.exception() if future is not None and done else None
            everyone = gather_objects([(done, failure)])
            if failures := [failure for _, failure in everyone if failure is not None]:
                raise failures[0]
            if all(done for done, _ in everyone):
                return


def seed_everything(seed: int) -> None:
    """Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def select_device(device: str) -> torch.device | None:
    """Makes "cuda:1" the current GPU and returns it; None when `device` names no index."""
    kind, index = device_kind(device)
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {device!r} asked for, but torch sees no GPU; use device: cpu")
    if not index:
        return None
    if (launched := launched_processes()) > 1:
        raise InputError(
            f"device: {device!r} is one GPU, but {launched} processes were launched; "
            "use device: cuda, and each takes its own"
        )
    if int(index) >= (count := torch.cuda.device_count()):
        raise InputError(
            f"device: {device!r} asked for, but torch sees {count} GPU(s); "
            f"use one of cuda:0 to cuda:{count - 1}"
        )
    torch.cuda.set_device(int(index))
    return torch.device("cuda", int(index))


def device_kind(device: str) -> tuple[str, str]:
    """Kind and index: of "cuda:1" and "1" cuda and 1, of "cpu" cpu and nothing."""
    kind, _, index = device.partition(":")
    return ("cuda", kind) if kind.isdigit() else (kind, index)


def launched_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_of_host() -> int:
    """How many were started on this host; 1 where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def build_accelerator(prec: Precision, device: str) -> Any:
    """The Accelerator of this process; `device` is "auto", "cpu", "cuda" or "cuda:1".

    Built anew at every call, in the process group that already stands if there is one. Raises
    InputError when Accelerate's own environment or configuration made it another one than asked.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    chosen = select_device(device)
    check_launch(os.environ)
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if prec == "fp16" and on_cpu:
        raise InputError("prec: fp16 needs a GPU (loss scaling); use prec: bf16 or fp32 on a CPU")
    # Accelerate keeps the first precision and device of a process for all later ones.
    AcceleratorState._reset_state(reset_partial_state=True)
    with without(ENGINE_VARIABLES):
        state = PartialState(cpu=on_cpu)
        if chosen is not None:
            state.device = chosen
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="fp16" if prec == "fp16" else "no",  # fp16: its gradient scaler
            step_scheduler_with_optimizer=False,
        )
    check_accelerator(accelerator, device)
    return accelerator


def check_launch(environment: Mapping[str, str]) -> None:
    """Raises InputError where a variable promises several processes and no launcher made them."""
    world = environment.get("WORLD_SIZE", "1")
    rank = environment.get("RANK", "0")
    size, number = whole_number(world), whole_number(rank)
    if size is None or number is None or number >= size:
        given = world if "WORLD_SIZE" in environment else "not set"
        raise InputError(
            f"RANK is {rank}, but WORLD_SIZE is {given}: start several processes with torchrun or "
            "accelerate launch, or unset RANK and WORLD_SIZE"
        )
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if world != "1" and (missing := [name for name in needed if name not in environment]):
        raise InputError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} not set: start several processes "
            "with torchrun or accelerate launch, or unset WORLD_SIZE"
        )


@contextmanager
def without(variables: Sequence[str]) -> Iterator[None]:
    """Environment variables are not there inside."""
    taken = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def group_alone(device: torch.device) -> None:
    """A process group of this one process, for engines that need one, unless there is a group."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def check_accelerator(accelerator: Any, device: str) -> None:
    """Raises InputError for what Accelerate took from its environment against the config."""
    launched = launched_processes()
    if accelerator.num_processes != launched:
        raise InputError(
            f"{launched} processes were launched but Accelerate runs {accelerator.num_processes}; "
            "on CPU start with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        )
    kind, _ = device_kind(device)
    if kind != "auto" and accelerator.device.type != kind:
        raise InputError(
            f"device: {device!r} asked for, but Accelerate chose {str(accelerator.device)!r}; "
            "unset ACCELERATE_TORCH_DEVICE and ACCELERATE_USE_CPU"
        )
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        raise InputError(
            f"Accelerate was told to accumulate over {steps} steps, which would divide gradients "
            f"by {steps}; unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS and set "
            "gradient_accumulation_steps in the config instead"
        )
    engine = accelerator.distributed_type.value
    if engine not in ENGINES:
        raise InputError(
            f"Accelerate is set to {engine}, but only {', '.join(ENGINES)} are supported; start "
            "with torchrun, without ACCELERATE_USE_* variables"
        )


def set_matmul_precision(tf32: bool) -> None:
    """Whether PyTorch's fp32 products on a GPU may be in TF32 (10 bits of 23)."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def autocast(prec: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Low-precision arithmetic for the forward pass; parameters stay as they are stored."""
    if prec == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if prec == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)
