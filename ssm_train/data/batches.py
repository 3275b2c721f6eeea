"""Examples to batches: right-padded rows, or packed documents. What is real, padding or supervised
is decided by position, never by token id."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ssm_train.adapters.base import Batch
from ssm_train.data.tokens import TokenizedDataset

Indices = NDArray[np.int64]


def collate(dataset: TokenizedDataset, examples: Indices) -> Batch:
    """Rows [B, T] padded on the right, with the label's tokens as targets, row by row."""
    lengths = dataset.lengths[examples]
    return _batch(dataset, examples, np.arange(lengths.max()) < lengths[:, None])


def pack(dataset: TokenizedDataset, examples: Indices, tokens: int) -> Batch:
    """Documents one after the other in a row [1, T], T = `tokens`.

    The rest of the row is padding: a last segment of `cu_seqlens` that is no example.
    """
    lengths = dataset.lengths[examples]
    total = int(lengths.sum())
    assert total <= tokens, (total, tokens)
    ends = np.cumsum(lengths)
    segments = [0, *ends] if total == tokens else [0, *ends, tokens]
    batch = _batch(dataset, examples, np.arange(tokens)[None] < total)
    batch.attention_mask = None
    batch.cu_seqlens = torch.tensor(segments, dtype=torch.int32)
    return batch


def _batch(dataset: TokenizedDataset, examples: Indices, real: NDArray[np.bool_]) -> Batch:
    """The batch whose real tokens [B, T], in row-major order, are the examples one after the
    other."""
    lengths = dataset.lengths[examples]
    input_ids = np.full(real.shape, dataset.pad_id, dtype=np.int64)
    position_ids, sequence_ids = np.zeros_like(input_ids), np.full_like(input_ids, -1)
    learnt = np.zeros_like(real)
    input_ids[real], learnt[real] = dataset.join(examples)
    position_ids[real] = count_up(lengths)
    sequence_ids[real] = np.repeat(np.arange(len(examples)), lengths)
    # The token at position t is predicted at position t - 1, which is of the same example.
    target_positions = np.flatnonzero(learnt) - 1
    targets = input_ids.reshape(-1)[target_positions + 1]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        target_positions=torch.from_numpy(target_positions),
        targets=torch.from_numpy(targets),
        sequence_ids=torch.from_numpy(sequence_ids),
        position_ids=torch.from_numpy(position_ids),
        attention_mask=torch.from_numpy(real),
        example_ids=tuple(examples.tolist()),
        num_tokens=int(lengths.sum()),
    )


def count_up(lengths: Indices) -> Indices:
    """0 .. n - 1 for each n of `lengths`, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def batches_by_length(lengths: Indices, batch_size: int) -> list[Indices]:
    """All examples in batches of similar lengths, the longest first: for evaluation. If memory
    does not suffice, it does not in the first batch."""
    order = np.argsort(-lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
