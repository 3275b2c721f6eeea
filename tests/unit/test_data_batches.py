"""Batches: every field against a slow, obvious construction; padding is a matter of position."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from ssm_train.data.batches import batches_by_length, collate, count_up, pack
from ssm_train.data.order import PackedOrder
from ssm_train.data.tasks import build_task
from ssm_train.data.tokens import Chunk, TokenizedDataset

TASK = build_task({"type": "generation", "prompt": "{a}", "label": "{b}"})
PAD = EOS = 0  # the same id, as in many tokenizers; and prompts hold it too
PARTS = [([5, 0, 6], [7, EOS]), ([8], [9, 9, 9, EOS]), ([0, 0], [EOS]), ([3, 4, 3, 4], [5])]


def dataset(parts=PARTS) -> TokenizedDataset:
    whole = [prompt + label for prompt, label in parts]
    learnt = [[False] * len(prompt) + [True] * len(label) for prompt, label in parts]
    chunk = Chunk(
        ids=np.array(sum(whole, []), dtype=np.int32),
        learnt=np.array(sum(learnt, [])),
        lengths=np.array([len(ids) for ids in whole]),
        prompt_lengths=np.array([len(prompt) for prompt, _ in parts]),
    )
    return TokenizedDataset(TASK, "x", [chunk], pad_id=PAD, eos_id=EOS)


def supervised(batch) -> list[tuple[int, int, int]]:
    """(document, position, target) of every supervised prediction."""
    flat = batch.target_positions
    documents = batch.sequence_ids.flatten()[flat].tolist()
    positions = batch.position_ids.flatten()[flat].tolist()
    return list(zip(documents, positions, batch.targets.tolist(), strict=True))


def expected(examples) -> list[tuple[int, int, int]]:
    return [
        (n, len(PARTS[i][0]) - 1 + j, token)
        for n, i in enumerate(examples)
        for j, token in enumerate(PARTS[i][1])
    ]


def test_rows_are_padded_on_the_right():
    examples = np.array([2, 0, 3, 1])
    batch = collate(dataset(), examples)
    assert batch.input_ids.tolist() == [
        [0, 0, 0, PAD, PAD],
        [5, 0, 6, 7, 0],
        [3, 4, 3, 4, 5],
        [8, 9, 9, 9, 0],
    ]
    assert batch.attention_mask.sum(1).tolist() == [3, 5, 5, 5]
    assert batch.attention_mask[0].tolist() == [True] * 3 + [False] * 2
    assert batch.sequence_ids[:2].tolist() == [[0, 0, 0, -1, -1], [1] * 5]
    assert batch.position_ids[:2].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert supervised(batch) == expected(examples)
    assert (batch.example_ids, batch.num_tokens, batch.num_targets) == ((2, 0, 3, 1), 18, 8)
    assert batch.cu_seqlens is None


@pytest.mark.parametrize("tokens", [12, 16])
def test_documents_are_packed_with_a_tail_of_padding(tokens):
    examples = np.array([1, 2, 0])[: 3 if tokens == 16 else 2]
    tokens = tokens if len(examples) == 3 else 8
    batch = pack(dataset(), examples, tokens)
    documents = [sum(PARTS[i], []) for i in examples]
    flat = sum(documents, [])
    assert batch.input_ids.tolist() == [flat + [PAD] * (tokens - len(flat))]
    ends = np.cumsum([len(d) for d in documents]).tolist()
    tail = [] if ends[-1] == tokens else [tokens]
    assert batch.cu_seqlens.tolist() == [0, *ends, *tail]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.attention_mask is None
    assert batch.sequence_ids[0].tolist() == sum(
        ([n] * len(d) for n, d in enumerate(documents)), []
    ) + [-1] * (tokens - len(flat))
    assert batch.position_ids[0, : len(flat)].tolist() == [
        t for d in documents for t in range(len(d))
    ]
    assert supervised(batch) == expected(examples)
    assert (batch.example_ids, batch.num_tokens) == (tuple(examples.tolist()), len(flat))


def test_packed_and_padded_rows_supervise_the_same():
    examples = np.array([0, 1, 2, 3])
    assert supervised(pack(dataset(), examples, 30)) == supervised(collate(dataset(), examples))


def test_a_target_is_the_next_token_of_the_same_document():
    for batch in (collate(dataset(), np.arange(4)), pack(dataset(), np.arange(4), 20)):
        flat, documents = batch.input_ids.flatten(), batch.sequence_ids.flatten()
        at = batch.target_positions
        assert (flat[at + 1] == batch.targets).all()
        assert (documents[at + 1] == documents[at]).all() and (documents[at] >= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_packed_rows_over_chunks_hold_each_document_once(seed):
    """Documents of one token up to a whole row, in chunks of which some are empty."""
    draw = np.random.default_rng(seed)
    lengths = [64, 1, 64, 63, *draw.integers(1, 65, size=60).tolist(), 2, 64]
    documents = [draw.integers(1, 99, size=n) for n in lengths]
    learnt = [np.arange(n) >= draw.integers(1, n + 1) for n in lengths]
    edges = [0, 0, *sorted(draw.integers(0, len(lengths), size=4).tolist()), len(lengths)]
    chunks = [
        Chunk(
            ids=np.concatenate([[], *documents[start:end]]).astype(np.int32),
            learnt=np.concatenate([[], *learnt[start:end]]).astype(np.bool_),
            lengths=np.array(lengths[start:end], dtype=np.int64),
            prompt_lengths=np.ones(end - start, dtype=np.int64),
        )
        for start, end in [*pairwise(edges), (len(lengths), len(lengths))]
    ]
    data = TokenizedDataset(TASK, "x", chunks, pad_id=PAD, eos_id=EOS)
    order = PackedOrder(data.lengths, 64, seed=seed)
    seen = []
    for step in range(order.steps_in_epoch(0)):
        (row,) = order.micro_batches(step)
        batch = pack(data, row, 64)
        bounds = batch.cu_seqlens.tolist()
        targets = np.zeros(64, dtype=bool)
        targets[batch.target_positions.numpy() + 1] = True
        for i, (start, end) in zip(row, pairwise(bounds), strict=False):
            assert batch.input_ids[0, start:end].tolist() == documents[i].tolist()
            assert targets[start:end].tolist() == learnt[i].tolist()
        assert batch.targets.tolist() == batch.input_ids[0][targets].tolist()
        assert bounds[-1] == 64 and not targets[bounds[len(row)] :].any()
        seen += row.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_evaluation_batches_hold_everything_longest_first():
    lengths = np.array([3, 9, 1, 9, 4, 2, 7])
    batches = [lengths[b].tolist() for b in batches_by_length(lengths, 3)]
    assert batches == [[9, 9, 7], [4, 3, 2], [1]]
    assert sorted(np.concatenate(batches_by_length(lengths, 3)).tolist()) == list(range(7))


def test_count_up():
    assert count_up(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]
    assert count_up(np.array([], dtype=np.int64)).tolist() == []
