"""The tasks that have a name, and how the `task:` of a config is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ssm_train.data.published import Published
from ssm_train.data.tasks import alpaca, choice, dart, glue, images, samsum
from ssm_train.data.tasks.chat import ChatTask
from ssm_train.data.tasks.corpus import CorpusTask
from ssm_train.data.tasks.quickstart import QUICKSTART
from ssm_train.data.tasks.spider import SpiderTask
from ssm_train.data.tasks.spider import release as spider
from ssm_train.data.tasks.task import Record, Task
from ssm_train.data.tasks.text import ClassificationTask, GenerationTask
from ssm_train.errors import InputError, near

SST2 = ClassificationTask(
    prompt="review : {sentence} \nfeeling :",
    label_field="label",
    labels={0: " negative", 1: " positive"},
    metrics=["accuracy"],
)

TASKS: dict[str, Task] = {
    "dart": dart.DART,
    "quickstart": QUICKSTART,
    "sst2": SST2,
}

PUBLISHED: dict[str, Published] = {
    **glue.DATASETS,
    **dart.DATASETS,
    **samsum.DATASETS,
    **spider.DATASETS,
    **alpaca.DATASETS,
    **choice.DATASETS,
    **images.DATASETS,
}
"""Published data sets by the name that a config gives them."""

Written = ClassificationTask | GenerationTask | ChatTask | CorpusTask | SpiderTask

TYPES: dict[str, type[Written]] = {
    "classification": ClassificationTask,
    "generation": GenerationTask,
    "chat": ChatTask,
    "text": CorpusTask,
    "spider": SpiderTask,
}
"""`type` of a task that a config writes out -> its schema."""


def build_task(spec: str | Mapping[str, Any]) -> Task:
    """A task from its name, or from a mapping {type, prompt, ...}. Raises InputError."""
    if isinstance(spec, str):
        if spec not in TASKS:
            raise InputError(
                f"task: unknown name {spec!r}{near(spec, TASKS)}; known: {', '.join(TASKS)}, "
                f"or a mapping with type, prompt, ..."
            )
        return TASKS[spec]
    kind = spec.get("type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise InputError(f"task.type is {kind!r}; expected {', '.join(TYPES)}")
    try:
        return TYPES[kind].model_validate(dict(spec))
    except ValidationError as error:
        raise InputError(_explain(error, TYPES[kind])) from None


def guess_task(record: Record) -> Task | None:
    """The task of a record in one of the usual shapes: messages, prompt and completion, text.

    None where the fields say nothing.
    """
    for field in ("messages", "conversations"):
        if isinstance(record.get(field), list):
            return ChatTask(field=field)
    if {"prompt", "completion"} <= set(record):
        if isinstance(record["prompt"], list):
            return ChatTask()
        return GenerationTask(prompt="{prompt}", label="{completion}")
    return CorpusTask() if isinstance(record.get("text"), str) else None


def _explain(error: ValidationError, schema: type[Written]) -> str:
    """The first violation in one line."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        known = list(schema.model_fields)
        return f"task: unknown key {key!r}{near(key, known)}; known: {', '.join(known)}"
    description = " ".join(str(schema.model_fields[key].description).split())
    if first["type"] == "missing":
        return f"task.{key} is missing: {description}"
    reason = first["msg"].removeprefix("Value error, ")
    return f"task.{key} is {str(first['input'])[:60]!r}: {reason}; expected: {description}"
