"""What a run trained on, in a hash: the same data give the same one wherever they are."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from ssm_train.data.tokens import TokenizedDataset

ALL_TOKENS = 2**23  # hashed in full, in milliseconds
SAMPLED = 4_096  # examples of larger data


def fingerprint(dataset: TokenizedDataset) -> dict[str, Any]:
    """Number of examples and tokens, and a SHA-256 of the length of every example and of the tokens
    of all, or of evenly spread ones where there are more than `ALL_TOKENS`."""
    lengths = dataset.lengths
    tokens = int(lengths.sum())
    content = hashlib.sha256(lengths.tobytes())
    if tokens <= ALL_TOKENS:
        hashed = "all tokens"
        parts = [*(c.ids for c in dataset.chunks), *(c.learnt for c in dataset.chunks)]
    else:
        number = min(SAMPLED, len(lengths))
        hashed = f"lengths, {number:,} examples"
        parts = [*dataset.join(np.linspace(0, len(lengths) - 1, number).astype(np.int64))]
    for part in parts:
        content.update(part.tobytes())
    return {
        "examples": len(lengths),
        "tokens": tokens,
        "sha256": content.hexdigest(),
        "hashed": hashed,
    }
