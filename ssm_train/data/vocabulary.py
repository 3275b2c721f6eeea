"""Builds a tokenizer from training texts: whole words, or byte-level BPE. Always the same one for
the same texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from ssm_train.errors import InputError, near
from ssm_train.settings import Settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
BYTES = 256


class TokenizerSettings(Settings):
    """A tokenizer to be built, the mapping form of `tokenizer:`."""

    type: Literal["word", "bpe"]
    """word: texts split at white space; bpe: byte-level byte-pair encoding."""
    vocab_size: int | None = Field(default=None, ge=4)
    """Most tokens, special ones included; None: every word, or 4,096 for bpe."""


def build_tokenizer(texts: Iterable[str], spec: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """A fast tokenizer with `<pad>` 0, `<eos>` 1 and, for words, `<unk>` 2.

    word: the most frequent words, ties in alphabetical order; decodes to words joined by spaces.
    bpe: decodes to the very text. Raises InputError: bad spec, no text.
    """
    from transformers import PreTrainedTokenizerFast

    settings = _read_spec(spec)
    names = {"pad_token": PAD, "eos_token": EOS}
    if settings.type == "word":
        tokenizer = _word_tokenizer(texts, settings.vocab_size)
        names["unk_token"] = UNKNOWN
    else:
        tokenizer = _bpe_tokenizer(texts, settings.vocab_size or 4096)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **names,
    )


def _read_spec(spec: Mapping[str, Any]) -> TokenizerSettings:
    try:
        settings = TokenizerSettings.model_validate(dict(spec))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            hint = near(key, TokenizerSettings.model_fields)
            raise InputError(f"tokenizer: unknown key {key!r}{hint}") from None
        description = TokenizerSettings.model_fields[key].description
        raise InputError(f"tokenizer.{key} is {spec.get(key)!r}; expected: {description}") from None
    if settings.type == "bpe" and (settings.vocab_size or BYTES + 2) < BYTES + 2:
        raise InputError(
            f"tokenizer.vocab_size is {settings.vocab_size}; bpe needs at least {BYTES + 2}"
        )
    return settings


def _word_tokenizer(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers

    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    for special in (PAD, EOS, UNKNOWN):
        counts.pop(special, None)
    if not counts:
        raise InputError("tokenizer: the training texts hold no word to build it from")
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = [PAD, EOS, UNKNOWN, *words][:vocab_size]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    count = 0

    def counted() -> Iterable[str]:
        nonlocal count
        for text in texts:
            count += bool(text)
            yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(counted(), trainer)
    if not count:
        raise InputError("tokenizer: the training texts are empty; nothing to build it from")
    return tokenizer
