"""From records to token ids: every segment of an example is tokenized by itself.

Loss is on the learnt segments only; which tokens those are is kept by position, never by id.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssm_train.data.pieces import cut, encode_all
from ssm_train.data.records import Placed, Records
from ssm_train.data.tasks.task import Rendered, Segment, Task
from ssm_train.data.tasks.text import ClassificationTask
from ssm_train.data.tokens import Chunk, Ids, TokenizedDataset
from ssm_train.errors import InputError


@dataclass(frozen=True)
class Encoder:
    """Turns records into chunks of ids; small enough to be sent to another process."""

    task: Task
    tokenizer: Any
    label_tokens: dict[str, int]
    """Classification: label word -> its token."""
    training: bool
    max_length: int | None = None
    """In training, longer examples are dropped or cut; evaluation keeps every example whole."""

    def encode(self, piece: Sequence[Placed]) -> Chunk:
        """Raises InputError with the place of the record that cannot be used."""
        rendered = list(render_records(self.task, piece, training=self.training))
        blank = [place for place, several in rendered if not several]
        placed = [(place, texts) for place, several in rendered for texts in several]
        ids_of = self.tokenize(s for _, texts in placed for s in texts.segments)
        examples: list[Example] = []
        dropped = 0
        for place, texts in placed:
            try:
                example = self.join(texts, [ids_of[segment] for segment in texts.segments])
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
            if not self.training or self.max_length is None or len(example) <= self.max_length:
                examples.append(example)
            elif texts.cut:
                examples += example.cut(self.max_length)
            else:
                dropped += 1
        return make_chunk(examples, dropped, blank, with_answers=not self.training)

    def join(self, texts: Rendered, parts: list[Ids]) -> Example:
        """One example of its segments' ids. Raises InputError without a place."""
        if self.label_tokens:
            parts[-1] = as_ids([self.label_tokens[texts.label]])
        if not len(parts[-1]):
            raise InputError("the label has no tokens")
        learnt = [segment.learnt for segment in texts.segments]
        if len(parts) == 1:  # text: nothing predicts its first token
            parts, learnt = [parts[0][:1], parts[0][1:]], [False, True]
        elif not any(map(len, parts[: learnt.index(True)])):
            raise InputError("the prompt has no tokens")
        prompt_length = sum(map(len, parts[:-1]))
        if texts.ends:
            parts, learnt = [*parts, as_ids([self.tokenizer.eos_token_id])], [*learnt, True]
        example = Example(parts, learnt, prompt_length, texts)
        if len(example) < 2:
            raise InputError("the text is one token long, so that there is nothing to predict")
        return example

    def tokenize(self, segments: Iterable[Segment]) -> dict[Segment, Ids]:
        """Ids of each different segment, so that what all prompts share is tokenized once.

        Special tokens are never added, and read only out of markup.
        """
        found: dict[Segment, Ids] = {}
        different = dict.fromkeys(segments)
        for special in (False, True):
            alike = [segment for segment in different if segment.special == special]
            for piece in cut(alike, lambda segment: len(segment.text)):
                encoded = self.tokenizer(
                    [segment.text for segment in piece],
                    add_special_tokens=False,
                    split_special_tokens=not special,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                    verbose=False,
                )
                found.update(zip(piece, map(as_ids, encoded["input_ids"]), strict=True))
        return found


@dataclass(frozen=True)
class Example:
    """One example's tokens, in parts."""

    parts: list[Ids]
    learnt: list[bool]  # of each part
    prompt_length: int
    texts: Rendered

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def cut(self, length: int) -> Iterator[Example]:
        """Text as pieces of at most `length` tokens; each begins with the last token of the one
        before, which is only read there, so that every token is learnt once."""
        ids = np.concatenate(self.parts)
        for start in range(0, len(ids) - 1, length - 1):
            parts = [ids[start : start + 1], ids[start + 1 : start + length]]
            yield Example(parts, [False, True], 1, self.texts)


def as_ids(tokens: Sequence[int]) -> Ids:
    return np.array(tokens, dtype=np.int32)


def make_chunk(
    examples: Sequence[Example], dropped: int, blank: Sequence[str], *, with_answers: bool
) -> Chunk:
    parts = [as_ids([]), *(part for example in examples for part in example.parts)]
    learnt = [False, *(flag for example in examples for flag in example.learnt)]
    return Chunk(
        ids=np.concatenate(parts),
        learnt=np.repeat(learnt, list(map(len, parts))),
        lengths=np.array(list(map(len, examples)), dtype=np.int64),
        prompt_lengths=np.array([example.prompt_length for example in examples], dtype=np.int64),
        references=tuple(e.texts.references for e in examples) if with_answers else (),
        contexts=tuple(e.texts.context for e in examples) if with_answers else (),
        dropped=dropped,
        blank=len(blank),
        first_blank=os.path.basename(blank[0]) if blank else "",
    )


def render_records(
    task: Task, rows: Iterable[Placed], *, training: bool
) -> Iterator[tuple[str, list[Rendered]]]:
    """(place, examples) of each record. Raises InputError with the record's place."""
    for place, record in rows:
        try:
            examples = task.render(record, training=training)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        yield place, examples


def tokenize_records(
    records: Records,
    task: Task,
    tokenizer: Any,
    *,
    training: bool,
    max_length: int | None = None,
    limit: int | None = None,
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> TokenizedDataset:
    """The examples of `records`, in memory.

    In training, examples of more than `max_length` tokens are dropped and counted, plain text is
    cut; evaluation keeps every example whole. Blank texts are left out and counted. `limit`: only
    the first so many records. `progress` gets the number of records done. What takes more than
    five seconds is shared by `num_workers` processes.

    Raises InputError: no records, a record that the task cannot use (with its line), all blank or
    too long, a label word that is not one token, no end-of-text token.
    """
    encoder = make_encoder(task, tokenizer, training=training, max_length=max_length)
    chunks = list(encode_records(encoder, records, limit, num_workers, progress))
    return make_dataset(encoder, records.name, chunks)


def make_encoder(task: Task, tokenizer: Any, *, training: bool, max_length: int | None) -> Encoder:
    """Raises InputError: a label word that is not one token, no end-of-text token."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token, which ends labels; "
            "set its eos_token, or choose another tokenizer"
        )
    return Encoder(task, tokenizer, find_label_tokens(task, tokenizer), training, max_length)


def make_dataset(encoder: Encoder, name: str, chunks: Sequence[Chunk]) -> TokenizedDataset:
    """The examples of a split; where the tokenizer has no pad token, end-of-text fills rows."""
    eos, pad = encoder.tokenizer.eos_token_id, encoder.tokenizer.pad_token_id
    return TokenizedDataset(
        task=encoder.task,
        name=name,
        chunks=chunks,
        pad_id=eos if pad is None else pad,
        eos_id=eos,
        class_ids=tuple(encoder.label_tokens.values()),
    )


def encode_records(
    encoder: Encoder,
    records: Records,
    limit: int | None = None,
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Chunk]:
    """The examples in pieces, in order; `tokenize_records` says which errors."""
    done = examples = dropped = 0
    for size, chunk in encode_all(encoder.encode, records, limit, num_workers):
        done += size
        examples += len(chunk)
        dropped += chunk.dropped
        if progress:
            progress(done)
        yield chunk
    if not done:
        raise InputError(f"{records.name} holds no records")
    if not examples:
        raise InputError(
            f"{records.name}: all {dropped} examples are longer than {encoder.max_length} tokens; "
            "raise max_length"
            if dropped
            else f"{records.name}: every text is blank; nothing to learn"
        )


def find_label_tokens(task: Task, tokenizer: Any) -> dict[str, int]:
    """Label word -> token, for classification; else nothing.

    Tokenizers differ in whether a word brings its space: the words are tried as written, then
    with a space before them, then without. Tokens that are white space and stand before every
    word do not count (Llama's "▁" before a digit). Raises InputError when no way makes each word
    one token of its own.
    """
    if not isinstance(task, ClassificationTask):
        return {}
    encoder = Encoder(task, tokenizer, {}, False)
    for spelling in (str, lambda word: " " + word.strip(), str.strip):
        segments = [Segment(spelling(word)) for word in task.words]
        ids_of = encoder.tokenize(segments)
        ids = [ids_of[segment].tolist() for segment in segments]
        starts = {tuple(word_ids[:-1]) for word_ids in ids}
        if len(starts) > 1 or not all(ids) or tokenizer.decode(list(starts.pop())).strip():
            continue
        tokens = {word: word_ids[-1] for word, word_ids in zip(task.words, ids, strict=True)}
        known = tokenizer.unk_token_id not in tokens.values()
        if known and len(set(tokens.values())) == len(tokens):
            return tokens
    shown = {
        segment.text: tokenizer.convert_ids_to_tokens(ids.tolist())
        for segment, ids in encoder.tokenize(map(Segment, task.words)).items()
    }
    unknown = tokenizer.unk_token
    word, tokens_of_word = max(shown.items(), key=lambda item: (unknown in item[1], len(item[1])))
    raise InputError(
        f"task.labels: {word!r} is not one token of its own for this tokenizer but "
        f"{tokens_of_word}; choose other label words"
    )
