"""A batch for which memory does not suffice: what is said of it, and how it is cut in two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ssm_train import distributed
from ssm_train.adapters.base import Batch
from ssm_train.ending import end_others
from ssm_train.errors import InputError


class BatchTooLarge(InputError):
    """Memory did not suffice for a batch."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(describe(batch))
        self.batch = batch


@contextmanager
def explain_out_of_memory(batch: Batch) -> Iterator[None]:
    """Inside, running out of memory raises BatchTooLarge; other processes, which may wait for this
    one, end with the same message."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise told_to_all(BatchTooLarge(batch)) from error


@contextmanager
def explain_out_of_memory_in_evaluation(rows: int) -> Iterator[None]:
    """The same for an evaluation in batches of so many rows; raises InputError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        why = f"out of memory in an evaluation with {rows} examples a batch: lower eval_batch_size"
        raise told_to_all(InputError(why)) from error


def told_to_all(error: InputError) -> InputError:
    """The error, with which the other processes end too."""
    end_others(str(error))
    return error


def describe(batch: Batch) -> str:
    rows, tokens = batch.input_ids.shape
    shape = f"a batch of {rows} x {tokens:,} tokens"
    lower = "lower batch_size, and raise gradient_accumulation_steps to keep the step"
    if batch.cu_seqlens is not None:
        shape, lower = f"a packed row of {tokens:,} tokens", "lower tokens_per_batch"
    elif rows == 1:
        lower = "lower max_length"
    rank = f" of rank {distributed.rank()}" if distributed.world_size() > 1 else ""
    return (
        f"out of memory on {shape}{rank}: {lower}, or set gradient_checkpointing: true; "
        "in one process, oom: shrink halves such batches"
    )


def cut(batch: Batch, elements: float) -> list[Batch]:
    """The batch in parts of less than so many elements, as far as it can be cut."""
    if batch.input_ids.numel() < elements or not (parts := halve(batch)):
        return [batch]
    return [smaller for part in parts for smaller in cut(part, elements)]


def halve(batch: Batch) -> list[Batch]:
    """Half the rows and the other half, or half the documents where they are packed; what has no
    target is left out. Nothing where there is only one. The batch is on the CPU."""
    rows, tokens = batch.input_ids.shape
    if batch.cu_seqlens is None:
        pieces = [(0, rows // 2), (rows // 2, rows)] if rows > 1 else []
        parts = [_rows(batch, start, end) for start, end in pieces]
    else:
        inner = batch.cu_seqlens[1:-1]
        middle = 1 + int((inner - tokens / 2).abs().argmin()) if len(inner) else 0
        pieces = [(0, middle), (middle, len(inner) + 1)] if middle else []
        parts = [_documents(batch, first, last) for first, last in pieces]
    return [part for part in parts if part.num_targets]


def _rows(batch: Batch, first: int, last: int) -> Batch:
    rows, tokens = slice(first, last), batch.input_ids.shape[1]
    start, end = first * tokens, last * tokens
    mine = (batch.target_positions >= start) & (batch.target_positions < end)
    sequences = batch.sequence_ids[rows]
    mask = batch.attention_mask
    return replace(
        batch,
        input_ids=batch.input_ids[rows],
        target_positions=batch.target_positions[mine] - start,
        targets=batch.targets[mine],
        sequence_ids=torch.where(sequences < 0, sequences, sequences - first),
        position_ids=batch.position_ids[rows],
        attention_mask=None if mask is None else mask[rows],
        example_ids=batch.example_ids[rows],
        num_tokens=int((sequences >= 0).sum()),
    )


def _documents(batch: Batch, first: int, last: int) -> Batch:
    assert batch.cu_seqlens is not None
    ends = batch.cu_seqlens[first : last + 1]
    start, end = int(ends[0]), int(ends[-1])
    mine = (batch.target_positions >= start) & (batch.target_positions < end)
    sequences = batch.sequence_ids[:, start:end]
    return replace(
        batch,
        input_ids=batch.input_ids[:, start:end],
        target_positions=batch.target_positions[mine] - start,
        targets=batch.targets[mine],
        sequence_ids=torch.where(sequences < 0, sequences, sequences - first),
        position_ids=batch.position_ids[:, start:end],
        cu_seqlens=ends - start,
        example_ids=batch.example_ids[first:last],
        num_tokens=int((sequences >= 0).sum()),
    )
