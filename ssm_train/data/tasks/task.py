"""What a task is: it turns a record into the texts of an example, and scores answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

Record = Mapping[str, Any]


class Segment(NamedTuple):
    """A piece of an example that is tokenized by itself."""

    text: str
    learnt: bool = False
    """Whether the loss is on its tokens."""
    special: bool = False
    """Whether special tokens are read out of it, as in the markup of a chat template."""


class Rendered(NamedTuple):
    """The texts of one example, in order. One segment alone is plain text: its first token is
    only read."""

    segments: tuple[Segment, ...]
    references: tuple[str, ...] = ()
    """Every right answer, without spaces around it; for generation metrics."""
    context: str = ""
    """What else scoring must know of the example, as text: its database, the end of a turn."""
    ends: bool = True
    """Whether the end-of-text token follows, and is learnt."""
    cut: bool = False
    """In training, text that is too long is cut into several examples instead of dropped."""

    @property
    def prompt(self) -> str:
        """What stands before the last segment."""
        return "".join(segment.text for segment in self.segments[:-1])

    @property
    def label(self) -> str:
        """The last segment: text to be learnt; for classification the label word."""
        return self.segments[-1].text


def ask(
    prompt: Iterable[str],
    label: str,
    references: tuple[str, ...],
    context: str = "",
    *,
    ends: bool = True,
) -> Rendered:
    """An example of a prompt, whose parts are tokenized one by one, and a label to learn."""
    segments = (*map(Segment, prompt), Segment(label, learnt=True))
    return Rendered(segments, references, context, ends)


class Task(Protocol):
    """How records become examples, and how answers are scored."""

    @property
    def type(self) -> str:
        """`classification` where the label is one token of its own."""
        ...

    @property
    def metrics(self) -> list[str]:
        """Names of what is scored, the main one first; empty where only the loss is measured."""
        ...

    def render(self, record: Record, *, training: bool) -> list[Rendered]:
        """The examples of a record, none where its text is blank. Raises InputError without a place
        for one it cannot use."""
        ...

    def score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        contexts: Sequence[str],
    ) -> dict[str, float]:
        """Metrics over all examples of a split, in their order: answers as text, the right answers
        and the context that `render` gave with each."""
        ...
