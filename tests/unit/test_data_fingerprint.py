"""The hash of a data set: equal for equal tokens, however they are kept; cheap for large data."""

import numpy as np
import pytest

from ssm_train.data import fingerprint as module
from ssm_train.data.fingerprint import fingerprint
from ssm_train.data.tasks import build_task
from ssm_train.data.tokens import Chunk, TokenizedDataset

TASK = build_task({"type": "generation", "prompt": "{a}", "label": "{b}"})


def dataset(examples: list[list[int]], cut: int = 0, learnt: int = 1) -> TokenizedDataset:
    """The last `learnt` tokens of each are learnt; in two chunks with a `cut`."""

    def chunk(some: list[list[int]]) -> Chunk:
        lengths = np.array([len(ids) for ids in some], dtype=np.int64)
        masks = [[i >= len(ids) - learnt for i in range(len(ids))] for ids in some]
        return Chunk(
            np.array(sum(some, []), dtype=np.int32), np.array(sum(masks, []), dtype=bool),
            lengths, lengths - learnt,
        )  # fmt: skip

    parts = [part for part in (examples[:cut], examples[cut:]) if part]
    return TokenizedDataset(TASK, "some", [chunk(part) for part in parts], 0, 1)


EXAMPLES = [[i, i + 1, *range(i % 5 + 2)] for i in range(100)]


def test_it_is_of_the_tokens_and_of_nothing_else() -> None:
    known = fingerprint(dataset(EXAMPLES))
    assert (known["examples"], known["tokens"]) == (100, sum(map(len, EXAMPLES)))
    assert known["hashed"] == "all tokens"
    assert fingerprint(dataset(EXAMPLES, cut=37)) == known
    hashes = {known["sha256"]}
    for i, place in ((0, 0), (57, 1), (99, 2)):
        changed = [list(ids) for ids in EXAMPLES]
        changed[i][place] += 1
        hashes.add(fingerprint(dataset(changed))["sha256"])
    hashes.add(fingerprint(dataset(EXAMPLES[::-1]))["sha256"])
    hashes.add(fingerprint(dataset(EXAMPLES, learnt=2))["sha256"])
    assert len(hashes) == 6


def test_of_large_data_all_lengths_and_some_examples_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALL_TOKENS", 100)
    monkeypatch.setattr(module, "SAMPLED", 10)
    known = fingerprint(dataset(EXAMPLES))
    assert known["hashed"] == "lengths, 10 examples"
    for i, same in ((0, False), (11, False), (99, False), (1, True)):
        changed = [list(ids) for ids in EXAMPLES]
        changed[i][0] += 1
        assert (fingerprint(dataset(changed)) == known) is same, i
    longer = [*EXAMPLES]
    longer[1] = [*longer[1], 7]
    assert fingerprint(dataset(longer)) != known
