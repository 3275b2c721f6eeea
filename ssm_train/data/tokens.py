"""Tokenized examples: pieces of flat arrays, in memory or mapped from an Arrow file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ssm_train.data.tasks.task import Task

Ids = NDArray[np.int32]
Lengths = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Chunk:
    """Some examples in a row, as flat arrays."""

    ids: Ids  # [sum of lengths]
    learnt: Mask  # [sum of lengths]: the loss is on these tokens
    lengths: Lengths  # [n]
    prompt_lengths: Lengths  # [n]: tokens before the last answer, at least 1
    references: tuple[tuple[str, ...], ...] = ()  # evaluation: every right answer of each
    contexts: tuple[str, ...] = ()  # evaluation: what scoring must know of each
    dropped: int = 0  # examples left out as too long
    blank: int = 0  # records left out as their text is blank
    first_blank: str = ""  # the place of the first of them, without its directory

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> Lengths:
        """[n + 1]: example i is ids[offsets[i] : offsets[i + 1]]."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)


@dataclass(frozen=True)
class TokenizedDataset:
    """The examples of a split. Only lengths are sure to be in memory."""

    task: Task
    name: str
    chunks: Sequence[Chunk]
    pad_id: int
    eos_id: int
    class_ids: tuple[int, ...] = ()
    """Classification: the token of each of the task's words."""
    _starts: Lengths = field(init=False, repr=False)  # [chunks]: first example of each

    def __post_init__(self) -> None:
        sizes = [0, *(len(chunk) for chunk in self.chunks)]
        object.__setattr__(self, "_starts", np.cumsum(sizes)[:-1])

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def lengths(self) -> Lengths:
        """[N] tokens of each example."""
        return np.concatenate([chunk.lengths for chunk in self.chunks])

    @cached_property
    def prompt_lengths(self) -> Lengths:
        """[N] tokens before the last answer of each example."""
        return np.concatenate([chunk.prompt_lengths for chunk in self.chunks])

    @property
    def dropped(self) -> int:
        """Training examples left out because they were too long."""
        return sum(chunk.dropped for chunk in self.chunks)

    def describe_blank(self) -> list[str]:
        """A line where records were left out because their text is blank."""
        with_blank = [chunk for chunk in self.chunks if chunk.blank]
        if not with_blank:
            return []
        count = sum(chunk.blank for chunk in with_blank)
        return [f"{self.name}: {count:,} blank text(s) skipped, first {with_blank[0].first_blank}"]

    def _find(self, i: int) -> tuple[Chunk, int]:
        number = int(self._starts.searchsorted(i, side="right")) - 1
        return self.chunks[number], int(i - self._starts[number])

    def example_ids(self, i: int) -> Ids:
        """All tokens of example i, [T]."""
        chunk, j = self._find(i)
        return chunk.ids[chunk.offsets[j] : chunk.offsets[j + 1]]

    def learnt(self, i: int) -> Mask:
        """Which tokens the loss is on, [T]; never the first, which nothing predicts."""
        chunk, j = self._find(i)
        return chunk.learnt[chunk.offsets[j] : chunk.offsets[j + 1]]

    def join(self, examples: Lengths) -> tuple[Ids, Mask]:
        """All tokens of some examples, one after the other, and which of them the loss is on."""
        numbers = self._starts.searchsorted(examples, side="right") - 1
        places = examples - self._starts[numbers]
        ids, learnt = [], []
        for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
            chunk = self.chunks[number]
            start, end = chunk.offsets[place], chunk.offsets[place + 1]
            ids.append(chunk.ids[start:end])
            learnt.append(chunk.learnt[start:end])
        return np.concatenate(ids), np.concatenate(learnt)

    def prompt_ids(self, i: int) -> Ids:
        return self.example_ids(i)[: self.prompt_lengths[i]]

    def label_ids(self, i: int) -> Ids:
        """The last answer, with the end-of-text token where there is one."""
        return self.example_ids(i)[self.prompt_lengths[i] :]

    def references(self, i: int) -> tuple[str, ...]:
        chunk, j = self._find(i)
        return chunk.references[j]

    def context(self, i: int) -> str:
        chunk, j = self._find(i)
        return chunk.contexts[j]
