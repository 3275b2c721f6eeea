"""Examples of random tokens, all of one length: what speed and memory are measured on
(`random_<length>`). There is nothing to learn, so only the loss is reported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssm_train.data.tokens import Chunk
from ssm_train.errors import InputError

SIZES = {"train": 1_024, "val": 64}
"""Examples of each split."""


def check_split(length: int, split: str) -> None:
    """Raises InputError: no such split, no room for a prompt and a label."""
    if split not in SIZES:
        raise InputError(f"random_{length} has no split {split!r}; it has {', '.join(SIZES)}")
    if length < 2:
        raise InputError(f"data: random_{length}: an example has at least 2 tokens")


def random_chunk(length: int, split: str, tokenizer: Any, limit: int | None = None) -> Chunk:
    """The examples of a split, or its first `limit`, of the tokenizer's ordinary tokens."""
    ids = draw_examples(length, split, ordinary_ids(tokenizer))[:limit]
    count, prompt = len(ids), prompt_length(length)
    return Chunk(
        ids=ids.reshape(-1),
        learnt=np.tile(np.arange(length) >= prompt, count),
        lengths=np.full(count, length),
        prompt_lengths=np.full(count, prompt),
        references=((),) * count,
        contexts=("",) * count,
    )


def draw_examples(
    length: int, split: str, vocabulary: Sequence[int], seed: int = 0
) -> NDArray[np.int32]:
    """[N, length] ids, each drawn uniformly from `vocabulary`; the same for the same arguments.

    Raises InputError as `check_split` does.
    """
    check_split(length, split)
    draw = np.random.default_rng([seed, length, list(SIZES).index(split)])
    places = draw.integers(len(vocabulary), size=(SIZES[split], length), dtype=np.int32)
    return np.asarray(vocabulary, dtype=np.int32)[places]


def prompt_length(length: int) -> int:
    """Tokens before the label, which is a tenth of an example and at least one token."""
    return length - max(1, length // 10)


def ordinary_ids(tokenizer: Any) -> list[int]:
    """The ids that stand for text, ascending: all of the vocabulary but special tokens.

    Raises InputError when there is none.
    """
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    if not ids:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} has special tokens only")
    return ids
