"""From records to token ids: prompt and label tokenized apart, kept as flat arrays.

Loss is on the label's tokens only; where they begin is kept as a position, never as an id.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssm_train.data.records import Numbered, Records
from ssm_train.data.tasks.text import ClassificationTask, Rendered, Task
from ssm_train.errors import InputError

CHUNK_RECORDS = 2_048
PARALLEL_FROM_RECORDS = 49_152  # below, starting processes costs more than it saves

Ids = NDArray[np.int32]
Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class TokenizedDataset:
    """Examples as prompt ids followed by label ids, all in one flat array."""

    task: Task
    name: str
    ids: Ids  # [sum of lengths]
    offsets: Lengths  # [N + 1]: example i is ids[offsets[i] : offsets[i + 1]]
    prompt_lengths: Lengths  # [N]: tokens before the label, at least 1
    pad_id: int
    eos_id: int
    class_ids: tuple[int, ...] = ()
    """Classification: the token of each of `task.words`."""
    references: tuple[tuple[str, ...], ...] = ()
    """Evaluation: every right answer of each example; empty for training."""
    dropped: int = 0
    """Training examples left out because they were too long."""

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @cached_property
    def lengths(self) -> Lengths:
        """[N] tokens of each example."""
        return np.diff(self.offsets)

    def example_ids(self, i: int) -> Ids:
        """Prompt and label, [T]."""
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    def prompt_ids(self, i: int) -> Ids:
        return self.ids[self.offsets[i] : self.offsets[i] + self.prompt_lengths[i]]

    def label_ids(self, i: int) -> Ids:
        return self.ids[self.offsets[i] + self.prompt_lengths[i] : self.offsets[i + 1]]


@dataclass(frozen=True)
class Encoder:
    """Turns rendered texts into ids; small enough to be sent to another process."""

    task: Task
    tokenizer: Any
    eos_id: int
    label_tokens: dict[str, int]
    """Classification: label word -> its token."""
    training: bool

    def encode(self, chunk: Sequence[Numbered], records: Records) -> Chunk:
        """Raises InputError with the place of the record that cannot be used."""
        rendered = list(render_records(self.task, records, chunk, training=self.training))
        numbers, examples = [n for n, _ in rendered], [example for _, example in rendered]
        prompts = self.tokenize([example.prompt for example in examples])
        if self.label_tokens:
            labels = [[self.label_tokens[example.label]] for example in examples]
        else:
            labels = self.tokenize([example.label for example in examples])
            for number, label in zip(numbers, labels, strict=True):
                if not label:
                    raise InputError(f"{records.where(number)}: the label has no tokens")
                label.append(self.eos_id)
        for number, prompt in zip(numbers, prompts, strict=True):
            if not prompt:
                raise InputError(f"{records.where(number)}: the prompt has no tokens")
        flat = [i for pair in zip(prompts, labels, strict=True) for ids in pair for i in ids]
        return Chunk(
            ids=np.array(flat, dtype=np.int32),
            prompt_lengths=np.array([len(prompt) for prompt in prompts], dtype=np.int64),
            label_lengths=np.array([len(label) for label in labels], dtype=np.int64),
            references=() if self.training else tuple(e.references for e in examples),
        )

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; special tokens are neither added nor read out of the text."""
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [list(ids) for ids in encoded["input_ids"]]


@dataclass(frozen=True)
class Chunk:
    """Some examples in a row, as flat arrays."""

    ids: Ids
    prompt_lengths: Lengths
    label_lengths: Lengths
    references: tuple[tuple[str, ...], ...]


def render_records(
    task: Task, records: Records, rows: Iterable[Numbered], *, training: bool
) -> Iterator[tuple[int, Rendered]]:
    """(record number, texts) of each example. Raises InputError with the record's place."""
    for number, record in rows:
        try:
            examples = task.render(record, training=training)
        except InputError as error:
            raise InputError(f"{records.where(number)}: {error}") from None
        for example in examples:
            yield number, example


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
    """The examples of `records`.

    In training, examples of more than `max_length` tokens are dropped and counted; evaluation
    keeps every example whole. `limit`: only the first so many records. `progress` gets the number
    of records done. From 49,152 records on, `num_workers` processes share the work.

    Raises InputError: no records, a record that the task cannot use (with its line), all too
    long, a label word that is not one token, no end-of-text token.
    """
    label_tokens = find_label_tokens(task, tokenizer)
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token, which ends labels; "
            "set its eos_token, or choose another tokenizer"
        )
    encoder = Encoder(task, tokenizer, eos_id, label_tokens, training)
    chunks: list[Chunk] = []
    done = 0
    for size, chunk in _encode_all(encoder, records, limit, num_workers):
        chunks.append(chunk)
        done += size
        if progress:
            progress(done)
    if not done:
        raise InputError(f"{records.name} holds no records")
    prompt_lengths = np.concatenate([chunk.prompt_lengths for chunk in chunks])
    lengths = prompt_lengths + np.concatenate([chunk.label_lengths for chunk in chunks])
    ids = np.concatenate([chunk.ids for chunk in chunks])
    keep = np.ones(len(lengths), dtype=bool)
    if training and max_length is not None:
        keep = lengths <= max_length
        if not keep.any():
            raise InputError(
                f"{records.name}: all {len(lengths)} examples are longer than {max_length} tokens "
                f"(the shortest has {lengths.min()}); raise max_length"
            )
        ids = ids[np.repeat(keep, lengths)]
    pad_id = tokenizer.pad_token_id
    return TokenizedDataset(
        task=task,
        name=records.name,
        ids=ids,
        offsets=np.concatenate([[0], np.cumsum(lengths[keep])]).astype(np.int64),
        prompt_lengths=prompt_lengths[keep],
        pad_id=eos_id if pad_id is None else pad_id,
        eos_id=eos_id,
        class_ids=tuple(label_tokens.values()),
        references=tuple(refs for chunk in chunks for refs in chunk.references),
        dropped=int((~keep).sum()),
    )


def find_label_tokens(task: Task, tokenizer: Any) -> dict[str, int]:
    """Label word -> token, for classification; else nothing.

    Tokenizers differ in whether a word brings its space: the words are tried as written, then
    with a space before them, then without. Raises InputError when no way makes each word one
    token of its own.
    """
    if not isinstance(task, ClassificationTask):
        return {}
    encoder = Encoder(task, tokenizer, -1, {}, False)
    for spelling in (str, lambda word: " " + word.strip(), str.strip):
        ids = encoder.tokenize([spelling(word) for word in task.words])
        if all(len(word_ids) == 1 for word_ids in ids):
            tokens = {word: word_ids[0] for word, word_ids in zip(task.words, ids, strict=True)}
            known = tokenizer.unk_token_id not in tokens.values()
            if known and len(set(tokens.values())) == len(tokens):
                return tokens
    ids = encoder.tokenize(list(task.words))
    shown = {
        word: tokenizer.convert_ids_to_tokens(word_ids)
        for word, word_ids in zip(task.words, ids, strict=True)
    }
    unknown = tokenizer.unk_token
    word, tokens_of_word = max(shown.items(), key=lambda item: (unknown in item[1], len(item[1])))
    raise InputError(
        f"task.labels: {word!r} is not one token of its own for this tokenizer but "
        f"{tokens_of_word}; choose other label words"
    )


def _encode_all(
    encoder: Encoder, records: Records, limit: int | None, num_workers: int
) -> Iterator[tuple[int, Chunk]]:
    """(records, their examples) in order: the first ones here, the rest in processes."""
    pieces = _cut(islice(records.rows, limit))
    for piece in islice(pieces, PARALLEL_FROM_RECORDS // CHUNK_RECORDS if num_workers else None):
        yield len(piece), encoder.encode(piece, records)
    first = next(pieces, None)
    if first is None:
        return
    source = Records(records.name, (), records.by_line)
    workers = min(num_workers, os.cpu_count() or 1)
    # Spawned, not forked: this process has threads, and may hold a GPU.
    with ProcessPoolExecutor(
        workers, get_context("spawn"), _start_worker, (encoder, source)
    ) as pool:
        waiting: deque[tuple[int, Future[Chunk]]] = deque()
        while first is not None or waiting:
            while first is not None and len(waiting) < 2 * workers:
                waiting.append((len(first), pool.submit(_encode_in_worker, first)))
                first = next(pieces, None)
            size, future = waiting.popleft()
            yield size, future.result()


def _cut(rows: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    rows = iter(rows)
    while piece := list(islice(rows, CHUNK_RECORDS)):
        yield piece


_worker: tuple[Encoder, Records] | None = None  # set once in each tokenizing process


def _start_worker(encoder: Encoder, records: Records) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process already has its core
    _worker = encoder, records


def _encode_in_worker(piece: list[Numbered]) -> Chunk:
    assert _worker is not None
    encoder, records = _worker
    return encoder.encode(piece, records)
