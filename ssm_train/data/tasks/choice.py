"""Questions that are answered by choosing: BoolQ (yes or no), PIQA, ARC and MMLU (a letter)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ssm_train.data.published import OFFICIAL, Part, Published, parquet_of, read_files
from ssm_train.data.records import (
    Numbered,
    Records,
    read_lines,
    read_records,
    read_table,
    readable,
)
from ssm_train.data.tasks.text import ClassificationTask
from ssm_train.errors import InputError

LETTERS = "ABCDE"
TRAIN_VAL = {"train": Part("train"), "val": Part("validation")}
"""BoolQ and PIQA: the labels of their test splits are not published."""


def choose_letter(count: int) -> ClassificationTask:
    """A question with `count` answers at most: fields question, choices (from `list_choices`) and
    label, a letter."""
    return ClassificationTask(
        prompt=["Choose the right answer.\n", "Question: {question}\n{choices}\n", "Answer:"],
        label_field="label",
        labels={letter: f" {letter}" for letter in LETTERS[:count]},
        metrics=["accuracy"],
    )


def list_choices(texts: Sequence[str], most: int) -> str:
    """One a line: `A. ...`. Raises ValueError for fewer than two or more than `most`."""
    if not 2 <= len(texts) <= most:
        raise ValueError(f"{len(texts)} choices; expected 2 to {most}")
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))


def read_class(value: Any) -> int:
    """0 or 1, from a number, a digit, or true and false. Raises ValueError; for -1 too, which
    marks test records without a label."""
    known = {"0": 0, "1": 1, "false": 0, "true": 1}
    if (name := str(value).lower()) not in known:
        raise ValueError(f"label {value!r}; known: {', '.join(known)}")
    return known[name]


# ---------------------------------------------------------------- BoolQ

BOOLQ = ClassificationTask(
    prompt=["Read the passage.\n", "{passage}\nQuestion: {question}?\n", "Answer, yes or no:"],
    label_field="label",
    labels={0: " no", 1: " yes"},
    metrics=["accuracy"],
)


def clean_boolq(record: dict[str, Any]) -> dict[str, Any]:
    """The release and the hub say `answer`, SuperGLUE says `label`."""
    value = record["answer"] if "answer" in record else record["label"]
    texts = {name: record[name] for name in ("passage", "question")}
    return texts | {"label": read_class(value)}


# ---------------------------------------------------------------- PIQA

PIQA = ClassificationTask(
    prompt=["Which way works?\n", "Goal: {goal}\nA. {sol1}\nB. {sol2}\n", "Answer:"],
    label_field="label",
    labels={0: " A", 1: " B"},
    metrics=["accuracy"],
)


def clean_piqa(record: dict[str, Any]) -> dict[str, Any]:
    texts = {name: record[name] for name in ("goal", "sol1", "sol2")}
    return texts | {"label": read_class(record["label"])}


def read_piqa(path: Path) -> Records:
    """A Parquet file with labels, or train.jsonl with train-labels.lst, a label a line.

    Raises InputError: no labels, or another number of them than of records.
    """
    records = read_records(path)
    if path.suffix != ".jsonl":
        return records
    return replace(records, rows=_label(records, path.with_name(f"{path.stem}-labels.lst")))


def _label(records: Records, path: Path) -> Iterator[Numbered]:
    if not path.is_file():
        raise InputError(f"{records.name} has no labels; put {path.name} next to it")
    labels = read_lines(path)
    rows = list(records.rows)
    if len(labels) != len(rows):
        raise InputError(f"{path} has {len(labels)} labels for {len(rows)} in {records.name}")
    for (number, record), label in zip(rows, labels, strict=True):
        yield number, record | {"label": label}


# ---------------------------------------------------------------- ARC

ARC = choose_letter(5)


def clean_arc(record: dict[str, Any]) -> dict[str, Any]:
    """Choices named 1, 2, ... become A, B, ...; the official files keep them in the question.

    Raises ValueError where the answer is none of the choices.
    """
    question = record["question"]
    if isinstance(question, Mapping):
        choices = {
            name: [choice[name] for choice in question["choices"]] for name in ("text", "label")
        }
        question = question["stem"]
    else:
        choices = record["choices"]
    if record["answerKey"] not in choices["label"]:
        raise ValueError(f"answerKey {record['answerKey']!r}; known: {', '.join(choices['label'])}")
    return {
        "question": question,
        "choices": list_choices(choices["text"], most=5),
        "label": LETTERS[list(choices["label"]).index(record["answerKey"])],
    }


def publish_arc(config: str) -> Published:
    """`config`: ARC-Easy or ARC-Challenge."""
    names = {"train": "Train", "validation": "Dev", "test": "Test"}
    return Published(
        task=ARC,
        folders=(
            *(f"ai2_arc/{config}", f"allenai/ai2_arc/{config}"),
            *(f"arc/{config}", f"ARC-V1-Feb2018-2/{config}", config),
        ),
        files={
            split: (*parquet_of(split), f"{config}-{name}.jsonl") for split, name in names.items()
        },
        hub="allenai/ai2_arc",
        hub_folder=config,
        splits=OFFICIAL,
        clean=clean_arc,
        source="the files are at https://allenai.org/data/arc",
    )


# ---------------------------------------------------------------- MMLU

MMLU = choose_letter(4)


MMLU_COLUMNS = ("question", *LETTERS[:4], "answer")


def clean_mmlu(record: dict[str, Any]) -> dict[str, Any]:
    """The hub's answer is a place in the choices, the official one a letter."""
    answer = record["answer"]
    choices = record["choices"] if "choices" in record else [record[c] for c in LETTERS[:4]]
    letters = LETTERS[: len(choices)]
    known = {name: letter for n, letter in enumerate(letters) for name in (str(n), letter)}
    if str(answer) not in known:
        raise ValueError(f"answer {answer!r}; known: {', '.join(letters)}, or a place from 0")
    return {
        "question": record["question"],
        "choices": list_choices(choices, most=4),
        "label": known[str(answer)],
    }


def read_mmlu(path: Path) -> Records:
    """A Parquet file, or an official CSV file, which has no header."""
    if path.suffix != ".csv":
        return read_records(path)
    read = partial(read_table, header=MMLU_COLUMNS, strict=False)
    return Records(str(path), readable(path, read), by_line=True)


def _mmlu_files(split: str, folder: str) -> tuple[str, ...]:
    return f"all/{split}-*.parquet", f"data/{folder}/*.csv", f"{folder}/*.csv"


# ---------------------------------------------------------------- data sets

DATASETS = {
    "boolq": Published(
        task=BOOLQ,
        folders=("boolq", "google/boolq", "BoolQ"),
        files={
            "train": (*parquet_of("train"), "train.jsonl"),
            "validation": (*parquet_of("validation"), "dev.jsonl", "val.jsonl"),
        },
        hub="google/boolq",
        splits=TRAIN_VAL,
        clean=clean_boolq,
        source="the files are at https://github.com/google-research-datasets/boolean-questions",
    ),
    "piqa": Published(
        task=PIQA,
        folders=("piqa", "baber/piqa", "ybisk/piqa", "physicaliqa-train-dev"),
        files={
            "train": (*parquet_of("train"), "piqa_train.parquet", "train.jsonl"),
            "validation": (
                *parquet_of("validation"),
                "piqa_validation.parquet",
                "valid.jsonl",
                "dev.jsonl",
            ),
        },
        hub="baber/piqa",
        splits=TRAIN_VAL,
        read=partial(read_files, read=read_piqa),
        clean=clean_piqa,
        beside=("*-labels.lst",),
        source="the files are at https://yonatanbisk.com/piqa",
    ),
    "arc-easy": publish_arc("ARC-Easy"),
    "arc-challenge": publish_arc("ARC-Challenge"),
    "arc": publish_arc("ARC-Challenge"),
    "mmlu": Published(
        task=MMLU,
        folders=("mmlu", "cais/mmlu", "MMLU"),
        files={
            "auxiliary_train": _mmlu_files("auxiliary_train", "auxiliary_train"),
            "validation": _mmlu_files("validation", "val"),
            "test": _mmlu_files("test", "test"),
        },
        hub="cais/mmlu",
        splits=OFFICIAL | {"train": Part("auxiliary_train")},
        read=partial(read_files, read=read_mmlu),
        clean=clean_mmlu,
        source="the files are at https://github.com/hendrycks/test",
    ),
}
