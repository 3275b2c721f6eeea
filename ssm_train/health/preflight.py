"""What a run proves of itself before its first step: every trained tensor is alive, and packed
documents are apart. Kernels that the step launches are compiled first.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ssm_train import distributed
from ssm_train.adapters.base import Batch
from ssm_train.data.batches import collate, pack
from ssm_train.ending import hear_others
from ssm_train.health.isolation import check_isolation
from ssm_train.health.liveness import check_liveness, unchanged
from ssm_train.health.out_of_memory import BatchTooLarge, explain_out_of_memory, halve
from ssm_train.watchdog import beat

if TYPE_CHECKING:
    from ssm_train.ready import Ready

FULL_ROW = 4096  # tokens from which on kernels choose as they do for longer rows


def compile_kernels(ready: Ready, model: nn.Module) -> None:
    """All ranks. What a training step and the proofs launch, before it is compiled one by one.

    Notes how long that took.
    """
    device, prepared = ready.engine.device, ready.subject.prepared
    if device.type != "cuda" or not any("riton" in name for name in prepared.kernels.values()):
        return
    began = time.perf_counter()
    from ssm_train.kernels.compiling import compile_ahead  # triton, which a CPU may do without

    batches = [ready.micro_batches(0)[0].to(device)]
    if ready.proves_isolation:
        batches += lay_pair(ready)
    try:
        with unchanged(model, training=True), compile_ahead():
            for batch in batches[:2]:
                ready.token_losses(model, batch).loss.backward()
            with torch.no_grad():
                ready.token_logits(model, batches[-1])
    except Exception as error:  # what is wrong shows again when kernels run
        reason = str(error).partition("\n")[0]
        warnings.warn(f"kernels are compiled one after the other: {reason}", stacklevel=2)
    if (seconds := time.perf_counter() - began) > 1:
        ready.notes.append(f"kernels compiled in {seconds:.1f} s")


def tell_compiling(
    device: torch.device, say: Callable[[str], None]
) -> AbstractContextManager[None]:
    """Lines about kernels under compilation, on rank 0 of a run on a GPU; else nothing. They are
    progress."""
    if device.type != "cuda" or not distributed.is_main():
        return nullcontext()
    from ssm_train.kernels import compiling  # triton, which a CPU may do without

    def say_progress(text: str) -> None:
        beat()
        say(text)

    return compiling.tell_compiling(say_progress)


def prove(ready: Ready, model: nn.Module) -> None:
    """All ranks. Notes that every trained tensor is alive and, in packed runs, that documents are
    apart. Raises InputError where they are not."""
    began = time.perf_counter()
    prove_alive(ready, model)
    proven = "every trained tensor is alive"
    if ready.proves_isolation:
        prove_isolated(ready, model)
        proven += " and packed documents are apart"
    ready.notes.append(f"{proven}, checked in {time.perf_counter() - began:.1f} s")


def prove_alive(ready: Ready, model: nn.Module) -> None:
    """All ranks. Raises InputError naming a trainable tensor without a gradient, or a batch that is
    too large."""
    batch = ready.micro_batches(0)[0]
    while True:
        try:
            with hear_others(), explain_out_of_memory(batch):
                return check_liveness(
                    model,
                    batch.to(ready.engine.device),
                    ready.token_losses,
                    reduce_max=distributed.reduce_max,
                )
        except BatchTooLarge:
            parts = halve(batch)
            if ready.cfg.oom == "stop" or not parts:
                raise
            batch = parts[0]


def prove_isolated(ready: Ready, model: nn.Module) -> None:
    """All ranks, on the same two documents. Raises InputError where packed ones touch."""
    pair, alone = lay_pair(ready)
    check_isolation(
        model, pair, alone, ready.token_losses, ready.token_logits,
        exact=ready.cfg.prec == "fp32" and pair.input_ids.device.type == "cpu",
    )  # fmt: skip


def lay_pair(ready: Ready) -> tuple[Batch, Batch]:
    """Two short documents in a row, with the targets of the second only, and that one alone."""
    device, row_tokens = ready.engine.device, ready.cfg.row_tokens
    examples, row = ready.data["train"], ready.order.micro_batches(0)[0]
    shortest = row[np.argsort(examples.lengths[row], kind="stable")[:2]]
    documents = np.resize(shortest, 2)  # the same one twice where there is one alone
    lengths = examples.lengths[documents]
    if device.type == "cpu":
        pair = pack(examples, documents, int(lengths.sum()))
        alone = collate(examples, documents[1:])
    else:  # padded rows have kernels of their own, which nothing has compiled
        tokens = compiled_length(int(lengths.sum()), row_tokens)
        pair, alone = (pack(examples, documents[i:], tokens) for i in range(2))
    second = pair.target_positions >= int(lengths[0])
    pair.targets, pair.target_positions = pair.targets[second], pair.target_positions[second]
    return pair.to(device), alone.to(device)


def compiled_length(tokens: int, row: int) -> int:
    """The length of a row for so many tokens, in a run with rows of `row`, for which hardly any
    kernel has to be compiled beside the run's own: they also ask whether 16 divides it."""
    return max(-(-tokens // 16) * 16, min(row, FULL_ROW))
