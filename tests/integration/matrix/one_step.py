"""One optimizer step of a cell, by the loop itself: in this process on a whole batch, and in two
processes (gloo) on half of it each."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from peft_tiny import make_batch
from safetensors.torch import save_file
from torch import Tensor

from matrix.cell import Cell, trainable
from ssm_train.adapters import common
from ssm_train.adapters.base import Batch
from ssm_train.distributed import build_accelerator
from ssm_train.engines.replicated import Replicated
from ssm_train.errors import InputError
from ssm_train.loop import Training, train_step
from ssm_train.optim import OptimSettings, build_optimizer
from ssm_train.schedule import Schedule

# With a small epsilon Adam's first step is the gradient's sign, which rounding may turn.
OPTIM = OptimSettings(learning_rate=1e-2, adam_epsilon=0.1, lr_scheduler_type="constant")
SCHEDULE = Schedule(1, 1, 1, 1, 1, 1)

Names = tuple[str, str, str]
"""Of a cell: method, family, precision."""


def halves() -> list[Batch]:
    """Two rows each; the second has fewer supervised tokens."""
    first, second = make_batch(2, 9, seed=3), make_batch(2, 9, seed=4)
    kept = slice(5)
    return [
        first,
        replace(
            second,
            targets=second.targets[kept],
            target_positions=second.target_positions[kept],
        ),
    ]


def whole() -> Batch:
    first, second = halves()
    return Batch(
        input_ids=torch.cat([first.input_ids, second.input_ids]),
        target_positions=torch.cat(
            [first.target_positions, second.target_positions + first.input_ids.numel()]
        ),
        targets=torch.cat([first.targets, second.targets]),
        sequence_ids=torch.cat([first.sequence_ids, second.sequence_ids + 2]),
        position_ids=torch.cat([first.position_ids, second.position_ids]),
    )


def take_step(cell: Cell, *batches: Batch, exact: bool = False) -> dict[str, Tensor]:
    """The trained values' gradients after clipping, and what the step added to them, by name.

    All ranks, each with its micro-batches. `exact`: of the copy in fp32.
    """
    engine = Replicated(build_accelerator("fp32", "cpu"))
    bare = copy.deepcopy(cell.exact if exact else cell.trained.model)
    values = trainable(bare)
    before = {name: p.detach().clone() for name, p in values.items()}
    no_decay = cell.trained.traits.no_decay
    engine.prepare(bare, lambda model: build_optimizer(model, OPTIM, no_decay, cell.lr_scale))
    seen: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        seen.update({f"gradient.{name}": p.grad.clone() for name, p in values.items()})

    engine.own_optimizer.register_step_pre_hook(keep)
    run = Training(
        engine=engine,
        token_losses=common.token_losses if exact else cell.token_losses,
        micro_batches=lambda step: [*batches],
        schedule=SCHEDULE,
        optim=OPTIM,
        prec="fp32",  # the cell's losses are under its own autocast
        log=print,
        evaluate=None,
        save=None,
    )
    train_step(run, 0).read()
    return seen | {f"step.{name}": p.detach() - before[name] for name, p in values.items()}


def file_of(names: Names) -> str:
    return f"{'-'.join(names)}.safetensors"


def take_steps_in_two_processes(cells: Iterable[Names], directory: Path) -> None:
    """Rank 0 writes what `take_step` gives, a file a cell; a cell that is refused has none."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, [*cells], str(directory)), nprocs=2)


def worker(rank: int, port: int, cells: list[Names], directory: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        build_accelerator("fp32", "cpu")  # before injection, whose start rank 0 gives to all
        for names in cells:
            try:
                cell = Cell(*names)
            except InputError:
                continue
            found = take_step(cell, halves()[rank])
            if rank == 0:
                save_file(
                    {k: t.contiguous() for k, t in found.items()}, Path(directory, file_of(names))
                )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
