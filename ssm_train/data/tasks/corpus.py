"""Plain text to go on writing: every token is learnt, long documents are cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ssm_train.data.tasks.task import Record, Rendered, Segment
from ssm_train.data.tasks.text import field_value
from ssm_train.errors import InputError
from ssm_train.settings import Settings


class CorpusTask(Settings):
    """A field is text to be learnt, ended by the end-of-text token."""

    type: Literal["text"] = "text"
    field: str = "text"
    """Field that holds the text."""

    @property
    def metrics(self) -> list[str]:
        """None: text is measured by its loss and perplexity."""
        return []

    def render(self, record: Record, *, training: bool) -> list[Rendered]:
        """One document; none of a blank text. Raises InputError without a place: field missing, no
        text."""
        text = field_value(record, self.field)
        if not isinstance(text, str):
            raise InputError(f"field {self.field!r} is {str(text)[:40]!r}; expected text")
        if not text.strip():
            return []
        return [Rendered((Segment(text, learnt=True),), cut=True)]

    def score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        contexts: Sequence[str],
    ) -> dict[str, float]:
        """Nothing: there are no answers."""
        return {}
