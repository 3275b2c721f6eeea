"""Tokenizers built from texts: what they hold, that they are always the same, what is refused."""

import pytest
from transformers import AutoTokenizer

from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError

TEXTS = ["the cat sat .", "the dog sat on the cat", "zwölf — dogs"]


def test_word_vocabulary_is_by_frequency_then_alphabet():
    tokenizer = build_tokenizer(TEXTS, {"type": "word"})
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert words[:6] == ["<pad>", "<eos>", "<unk>", "the", "cat", "sat"]
    assert words[6:] == sorted(words[6:])
    assert tokenizer("the fish sat")["input_ids"] == [3, 2, 5]
    assert tokenizer.decode([3, 4, 5, words.index(".")]) == "the cat sat ."
    small = build_tokenizer(TEXTS, {"type": "word", "vocab_size": 5})
    assert len(small) == 5 and small("sat")["input_ids"] == [2]


def test_bpe_decodes_to_the_very_text():
    tokenizer = build_tokenizer(TEXTS * 4, {"type": "bpe", "vocab_size": 300})
    assert 258 < len(tokenizer) <= 300
    for text in [*TEXTS, " two  spaces\nand a 🐈", "<eos>"]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("spec", [{"type": "word"}, {"type": "bpe", "vocab_size": 290}])
def test_always_the_same_and_survives_saving(tmp_path, spec):
    first, second = (build_tokenizer(iter(TEXTS), spec) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    first.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == first.get_vocab()
    for text in TEXTS:
        ids = first(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == first.decode(ids) == text
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.padding_side) == (0, 1, "left")


@pytest.mark.parametrize(
    ("texts", "spec", "message"),
    [
        (TEXTS, {"type": "words"}, "tokenizer.type is 'words'; expected: word: texts split"),
        (TEXTS, {}, "tokenizer.type is None"),
        (TEXTS, {"type": "word", "size": 9}, "tokenizer: unknown key 'size'"),
        (TEXTS, {"type": "word", "vocab_size": 2}, "tokenizer.vocab_size is 2"),
        (TEXTS, {"type": "bpe", "vocab_size": 100}, "vocab_size is 100; bpe needs at least 258"),
        ([], {"type": "word"}, "hold no word"),
        ([""], {"type": "bpe"}, "are empty"),
    ],
)
def test_bad_specs(texts, spec, message):
    with pytest.raises(InputError) as caught:
        build_tokenizer(texts, spec)
    assert message in str(caught.value)
