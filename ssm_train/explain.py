"""Schema violations in words: where the value stands, what it is, what would be accepted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ssm_train.errors import near
from ssm_train.settings import Settings
from ssm_train.strict_yaml import Document, KeyPath

Provenance = dict[str, str]
"""Key, dotted when nested -> "default", "cfg/x.yaml:12", "command line" or "HP_LR"."""


NAMES_ELSEWHERE = {
    "bf16": "prec",
    "fp16": "prec",
    "dtype": "prec",
    "torch_dtype": "prec",
    "dataset": "data",
    "epochs": "num_epochs",
    "lora": "peft",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "metric_for_best_model": "metric_for_best",
    "model_name": "model",
    "model_name_or_path": "model",
    "num_train_epochs": "num_epochs",
    "output_dir": "output_root",
    "per_device_eval_batch_size": "eval_batch_size",
    "per_device_train_batch_size": "batch_size",
    "report_to": "trackers",
    "scheduler": "lr_scheduler_type",
    "train_file": "data",
    "validation_file": "val_data",
}
"""What other trainers call a key of ours."""


def explain(
    error: ValidationError, schema: type[Settings], document: Document, provenance: Provenance
) -> list[str]:
    """Schema violations as lines: where, which key, its value, what was expected."""
    problems: dict[str, None] = {}
    for item in sorted(error.errors(), key=lambda e: document.lines.get(e["loc"][:1], 0)):
        path: KeyPath = item["loc"]
        line = _explain_one(path, item["type"], item["input"], schema, document, provenance)
        if item["type"] == "value_error":  # a component's own check, with its own words
            line = f"{line.partition(': ')[0]}: {item['ctx']['error']}"
        problems[line] = None
    return list(problems)


def find_place(key: str, provenance: Provenance, otherwise: str) -> str:
    """Where the value of a dotted key came from; all the places, where parts were set apart."""
    places = [p for k, p in provenance.items() if k == key or k.startswith(f"{key}.")]
    if not places and "." in key:
        return find_place(key.rpartition(".")[0], provenance, otherwise)
    return ", ".join(dict.fromkeys(places)) or otherwise


def _explain_one(
    path: KeyPath,
    kind: str,
    value: Any,
    schema: type[Settings],
    document: Document,
    provenance: Provenance,
) -> str:
    head = str(path[0])
    inner = schema.model_fields[head].annotation if head in schema.model_fields else None
    nested = False
    if isinstance(inner, type) and issubclass(inner, Settings) and len(path) > 1:
        schema, nested = inner, True
    key = f"{head}.{path[1]}" if nested else head
    where = find_place(key if nested else head, provenance, document.source)
    if where == document.where((path[0],)):
        where = document.where(path[:2])
    if kind in ("extra_forbidden", "invalid_key"):  # the second: of a key that is no text
        known = list(schema.model_fields)
        if (meant := NAMES_ELSEWHERE.get(str(path[-1]))) in known:
            hint = f"; here it is {meant}"
        else:
            hint = near(str(path[-1]), known) or f"; known: {', '.join(sorted(known))}"
        return f"{where}: unknown key {key!r}{hint}"
    field = schema.model_fields[str(path[1]) if nested else head]
    if kind == "missing":
        meaning = " ".join(str(field.description).split())
        return f"{where}: {key} is missing; it is required: {meaning}"
    return f"{where}: {key} is {show(value)}; expected {expected(field)}"


def show(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "dict[str, Any]": "a mapping",
    "dict[int, float]": "a mapping of epoch -> number",
    "list[str]": "a list of names",
    "NoneType": "null",
    "None": "null",
    "PeftOverrides": "a mapping",
}


def _type_words(annotation: Any) -> Iterator[str]:
    """The types of a union, and the values of a literal, one by one."""
    if get_origin(annotation) is Literal:
        yield from (repr(option) for option in get_args(annotation))
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _type_words(part)
    elif get_origin(annotation) is Annotated:
        kind, rule = get_args(annotation)
        yield from (word + _bounds(rule.metadata) for word in _type_words(kind))
    elif isinstance(annotation, type) and not get_args(annotation):
        yield EXPECTED[annotation.__name__]
    else:
        yield EXPECTED[str(annotation).replace("typing.", "")]


BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _bounds(rules: Iterable[Any]) -> str:
    """What follows the type: `, at least 0 and less than 1`, or nothing."""
    bounds = [
        f"{words} {limit:g}"
        for rule in rules
        for attribute, words in BOUNDS.items()
        if (limit := getattr(rule, attribute, None)) is not None
    ]
    return f", {' and '.join(bounds)}" if bounds else ""


def expected(field: FieldInfo) -> str:
    """In words what a field takes: its type, its bounds, and null when allowed."""
    if any(getattr(rule, "pattern", None) for rule in field.metadata):
        return " ".join(str(field.description).split())
    words = list(_type_words(field.annotation))
    words[0] += _bounds(field.metadata)
    return (", or " if "," in words[0] else " or ").join(words)
