"""How a record becomes prompt and label by templates: classification over label words, and
generation with one or more references."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

from pydantic import Field, field_validator

from ssm_train.data.records import json_type
from ssm_train.data.tasks.task import Record, Rendered, ask
from ssm_train.errors import InputError, near
from ssm_train.scores import OUT_OF_CLASS, compute_metrics
from ssm_train.settings import Settings

CLASSIFICATION_METRICS = ("accuracy", "f1", "mcc")
GENERATION_METRICS = ("exact_match", "bleu", "meteor", "rouge1", "rouge2", "rougeL")


@lru_cache
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """`"is {x} so"` as (text, field after it or None) pairs; `{{` is a brace.

    Raises ValueError for anything but plain names in braces.
    """
    pieces = []
    for text, field, spec, conversion in string.Formatter().parse(template):
        if field is not None and (not field.isidentifier() or spec or conversion):
            raise ValueError(f"{{{field}}} is not a plain field name in braces")
        pieces.append((text, field))
    return tuple(pieces)


def fill(template: str, record: Record) -> str:
    """The template with its fields' values. Raises InputError without a place."""
    parts = []
    for text, field in parse_template(template):
        parts.append(text)
        if field is not None:
            parts.append(linearise(field, field_value(record, field)))
    return "".join(parts)


def field_value(record: Record, field: str) -> Any:
    """Raises InputError when the record has no such field."""
    if field not in record:
        hint = near(field, record) or f"; it has {', '.join(map(repr, record)) or 'none'}"
        raise InputError(f"no field {field!r}{hint}")
    return record[field]


def linearise(field: str, value: Any) -> str:
    """A field as text: text and numbers as they are, a list joined by " : ", a list of lists
    joined by " | " (DART: `Mars : MOON : Phobos | Mars : MOON : Deimos`).

    Raises InputError for null, not-a-number, mappings and deeper lists.
    """
    if isinstance(value, list) and value:
        if not any(isinstance(item, list) for item in value):
            return " : ".join(_plain(field, item) for item in value)
        if all(isinstance(item, list) and item for item in value):
            return " | ".join(" : ".join(_plain(field, part) for part in item) for item in value)
    return _plain(field, value)


def _plain(field: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise InputError(
        f"field {field!r} is or holds {json_type(value)} {str(value)[:40]!r}; expected text, "
        "a finite number, or a non-empty list (of lists) of them"
    )


def _check_template(template: str | list[str]) -> str | list[str]:
    parts = _parts(template)
    if not any(field for part in parts for _, field in parse_template(part)):
        raise ValueError("has no {field}")
    return template


def _parts(template: str | list[str]) -> tuple[str, ...]:
    return (template,) if isinstance(template, str) else tuple(template)


def check_metrics(known: tuple[str, ...]) -> Any:
    """A validator of the field `metrics`: raises ValueError for one that is not among `known`."""

    def check(names: list[str]) -> list[str]:
        for name in names:
            if name not in known:
                raise ValueError(f"unknown metric {name!r}; known: {', '.join(known)}")
        return names

    return field_validator("metrics")(check)


class ClassificationTask(Settings):
    """The label is one token, chosen among the label words."""

    type: Literal["classification"] = "classification"
    prompt: str | list[str]
    """Template of the text before the label, or several that are tokenized one by one."""
    label_field: str
    """Field that holds the class."""
    labels: dict[str | int | bool, str] = Field(min_length=2)
    """Value of the label field -> label word, which has to be one token."""
    metrics: list[str] = Field(default=list(CLASSIFICATION_METRICS), min_length=1)
    """Of accuracy, f1, mcc; the first one chooses the best checkpoint."""

    _check_prompt = field_validator("prompt")(_check_template)
    _check_metrics = check_metrics(CLASSIFICATION_METRICS)

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: dict[Any, str]) -> dict[Any, str]:
        if len({_label_key(value) for value in labels}) < len(labels):
            raise ValueError("two values read the same")
        return labels

    @property
    def words(self) -> tuple[str, ...]:
        """The classes, in order, each once (several values may share a word)."""
        return tuple(dict.fromkeys(self.labels.values()))

    @cached_property
    def _word_of(self) -> dict[str, str]:
        return {_label_key(value): word for value, word in self.labels.items()}

    def render(self, record: Record, *, training: bool) -> list[Rendered]:
        """One example. Raises InputError without a place: field missing, class unknown."""
        value = field_value(record, self.label_field)
        word = None if isinstance(value, list | dict) else self._word_of.get(_label_key(value))
        if word is None:
            known = ", ".join(map(repr, self.labels))
            raise InputError(f"label {value!r} in field {self.label_field!r}; known: {known}")
        prompt = [fill(part, record) for part in _parts(self.prompt)]
        return [ask(prompt, word, (word,), ends=False)]

    def score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        contexts: Sequence[str],
    ) -> dict[str, float]:
        """The task's metrics, and `out_of_cls`: the share of predictions that are no label word.

        Those count as wrong. `references`: the right word of each example, as a list of one.
        """
        classes = {word: number for number, word in enumerate(self.words)}
        chosen = [classes.get(word, OUT_OF_CLASS) for word in predictions]
        right = [classes[words[0]] for words in references]
        values = compute_metrics(self.metrics, chosen, right, num_classes=len(classes))
        return values | {"out_of_cls": chosen.count(OUT_OF_CLASS) / len(chosen)}


def _label_key(value: Any) -> str:
    """CSV has only text and JSON keys are text: 1, "1" and 1.0 are one class."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


class GenerationTask(Settings):
    """The label is text, ended by the end-of-text token."""

    type: Literal["generation"] = "generation"
    prompt: str | list[str]
    """Template of the text before the label, or several that are tokenized one by one."""
    label: str
    """Template of the text to learn. A field that is a list holds several references."""
    references: Literal["first", "each"] = "first"
    """Learn the first reference of a record, or each as an example of its own."""
    metrics: list[str] = Field(default=["bleu", "rougeL", "exact_match"], min_length=1)
    """Of exact_match, bleu, meteor, rouge1, rouge2, rougeL; the first one chooses the best
    checkpoint."""

    _check_templates = field_validator("prompt", "label")(_check_template)
    _check_metrics = check_metrics(GENERATION_METRICS)

    def render(self, record: Record, *, training: bool) -> list[Rendered]:
        """One example, or one a reference (`references: each`, in training).

        Raises InputError without a place: field missing, of a wrong type, label empty.
        """
        fields = [field for _, field in parse_template(self.label) if field]
        lists = [field for field in fields if isinstance(field_value(record, field), list)]
        if len(set(lists)) > 1:
            raise InputError(f"fields {lists[0]!r} and {lists[1]!r} of the label are both lists")
        if lists:
            name = lists[0]
            texts = [_plain(name, item) for item in record[name]]
            labels = [fill(self.label, {**record, name: text}) for text in texts]
        else:
            labels = [fill(self.label, record)]
        if not labels or not all(label.strip() for label in labels):
            raise InputError(f"the label {self.label!r} is empty")
        prompt = [fill(part, record) for part in _parts(self.prompt)]
        references = tuple(label.strip() for label in labels)
        learnt = labels if training and self.references == "each" else labels[:1]
        return [ask(prompt, label, references) for label in learnt]

    def score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        contexts: Sequence[str],
    ) -> dict[str, float]:
        """The task's metrics over all examples. `contexts`: what `render` gave with each."""
        return compute_metrics(self.metrics, predictions, references)
