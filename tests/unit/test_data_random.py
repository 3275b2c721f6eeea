"""Random examples: length, size, which ids, the same every time, and uniform."""

import numpy as np
import pytest
from tokenizers import AddedToken

from ssm_train.data.tasks.random_tokens import (
    SIZES,
    draw_examples,
    ordinary_ids,
    prompt_length,
)
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError

VOCABULARY = [3, 5, 8, 13, 21, 34, 55]


@pytest.mark.parametrize("length", [2, 7, 129])
def test_every_example_has_the_length_and_ids_of_the_vocabulary(length):
    for split, size in SIZES.items():
        examples = draw_examples(length, split, VOCABULARY)
        assert examples.shape == (size, length) and examples.dtype == np.int32
        assert set(np.unique(examples).tolist()) == set(VOCABULARY)
        assert 1 <= prompt_length(length) < length


def test_a_tenth_is_label():
    assert [length - prompt_length(length) for length in (2, 19, 20, 1000)] == [1, 1, 2, 100]


def test_the_same_for_the_same_arguments_and_another_for_each_other():
    first = draw_examples(64, "val", VOCABULARY)
    assert np.array_equal(first, draw_examples(64, "val", tuple(VOCABULARY)))
    others = [
        draw_examples(64, "train", VOCABULARY)[:64],
        draw_examples(65, "val", VOCABULARY)[:, :64],
        draw_examples(64, "val", VOCABULARY, seed=1),
    ]
    for other in others:  # independent draws of 7 ids agree in a seventh of the places
        assert abs((first == other).mean() - 1 / 7) < 0.04
    assert len(np.unique(first, axis=0)) == 64


@pytest.mark.parametrize("size", [2, 100, 4096])
def test_ids_are_uniform(size):
    """Pearson's statistic has mean k and variance 2k; too even is as wrong as too uneven."""
    vocabulary = range(10, 10 + size)
    examples = draw_examples(200, "train", vocabulary)
    for drawn in (examples, examples[:, :20], examples[:100]):
        counts = np.bincount(drawn.ravel() - 10, minlength=size)
        expected = drawn.size / size
        statistic = float(((counts - expected) ** 2 / expected).sum())
        freedom = size - 1
        assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5
    first, second = examples[:, :-1].ravel(), examples[:, 1:].ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / len(first) ** 0.5


def test_no_special_token_is_ordinary():
    tokenizer = build_tokenizer(["some text to learn"] * 3, {"type": "bpe"})
    assert tokenizer.add_tokens([AddedToken("<|role|>", special=True)]) == 1
    assert tokenizer.add_tokens(["  "]) == 1  # added but ordinary, as runs of spaces are
    special = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<|role|>")}
    ids = ordinary_ids(tokenizer)
    assert special.isdisjoint(ids) and special.union(ids) == set(range(len(tokenizer)))
    assert tokenizer.convert_tokens_to_ids("  ") in ids and ids == sorted(ids)
    drawn = draw_examples(50, "train", ids)
    text = tokenizer.batch_decode(drawn, skip_special_tokens=False)
    assert text == tokenizer.batch_decode(drawn, skip_special_tokens=True)


def test_words_that_are_unknown_are_not_drawn():
    tokenizer = build_tokenizer(["a b c"], {"type": "word"})
    assert tokenizer.convert_ids_to_tokens(ordinary_ids(tokenizer)) == ["a", "b", "c"]


def test_what_is_refused():
    with pytest.raises(InputError, match="random_8 has no split 'test'; it has train, val"):
        draw_examples(8, "test", VOCABULARY)
    with pytest.raises(InputError, match="random_1: an example has at least 2 tokens"):
        draw_examples(1, "train", VOCABULARY)
    tokenizer = build_tokenizer(["a"], {"type": "word"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["a"]})
    with pytest.raises(InputError, match="special tokens only"):
        ordinary_ids(tokenizer)
