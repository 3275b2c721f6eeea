"""GLUE: eight tasks of classifying a sentence or a pair, by digits as in the hub's labels.

Wang et al. 2019, https://arxiv.org/abs/1804.07461. The hub's Parquet or the official TSV files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ssm_train.data.published import Published, Read, parquet_of, read_files
from ssm_train.data.records import Numbered, Records, read_lines, read_records, readable
from ssm_train.data.tasks.text import ClassificationTask
from ssm_train.errors import InputError


@dataclass(frozen=True)
class Glue:
    """One task, and how its official files say what the hub's say."""

    folder: str
    """Of the official files."""
    fields: tuple[str, ...]
    """The hub's names of the texts."""
    classes: tuple[str, ...]
    """The official names of the labels 0, 1, ..."""
    prompt: list[str]
    metrics: list[str] = field(default_factory=lambda: ["accuracy"])
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field -> column of the official files, where they differ."""
    header: tuple[str, ...] = ()
    """Columns of official files that have no header line."""
    broken_lines: bool = False
    """Whether the official files have lines with too few columns, which are no records."""


TASKS = {
    "cola": Glue(
        folder="CoLA",
        fields=("sentence",),
        classes=("unacceptable", "acceptable"),
        prompt=[
            "Is this a sentence that a speaker of English would find well formed?\n",
            "Sentence: {sentence}\n",
            "Answer with 0 for no, 1 for yes:",
        ],
        metrics=["mcc"],
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": Glue(
        folder="SST-2",
        fields=("sentence",),
        classes=("negative", "positive"),
        prompt=[
            "Does the critic like the film?\n",
            "Review: {sentence}\n",
            "Answer with 0 for no, 1 for yes:",
        ],
    ),
    "mrpc": Glue(
        folder="MRPC",
        fields=("sentence1", "sentence2"),
        classes=("not_equivalent", "equivalent"),
        prompt=[
            "Do these two sentences from the news say the same?\n",
            "First: {sentence1}\nSecond: {sentence2}\n",
            "Answer with 0 for no, 1 for yes:",
        ],
        metrics=["accuracy", "f1"],
        columns={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    ),
    "qqp": Glue(
        folder="QQP",
        fields=("question1", "question2"),
        classes=("not_duplicate", "duplicate"),
        prompt=[
            "Would one answer do for both questions?\n",
            "First: {question1}\nSecond: {question2}\n",
            "Answer with 0 for no, 1 for yes:",
        ],
        metrics=["accuracy", "f1"],
        columns={"label": "is_duplicate"},
        broken_lines=True,
    ),
    "qnli": Glue(
        folder="QNLI",
        fields=("question", "sentence"),
        classes=("entailment", "not_entailment"),
        prompt=[
            "Is the answer to the question in the sentence?\n",
            "Question: {question}\nSentence: {sentence}\n",
            "Answer with 0 for yes, 1 for no:",
        ],
    ),
    "rte": Glue(
        folder="RTE",
        fields=("sentence1", "sentence2"),
        classes=("entailment", "not_entailment"),
        prompt=[
            "Does the claim follow from the text?\n",
            "Text: {sentence1}\nClaim: {sentence2}\n",
            "Answer with 0 for yes, 1 for no:",
        ],
    ),
    "wnli": Glue(
        folder="WNLI",
        fields=("sentence1", "sentence2"),
        classes=("not_entailment", "entailment"),
        prompt=[
            "The claim says whom or what a pronoun of the text means. Is it right?\n",
            "Text: {sentence1}\nClaim: {sentence2}\n",
            "Answer with 0 for no, 1 for yes:",
        ],
    ),
    "mnli": Glue(
        folder="MNLI",
        fields=("premise", "hypothesis"),
        classes=("entailment", "neutral", "contradiction"),
        prompt=[
            "Does the claim follow from the text?\n",
            "Text: {premise}\nClaim: {hypothesis}\n",
            "Answer with 0 for yes, 1 for open, 2 for the contrary:",
        ],
        columns={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
    ),
}


# ---------------------------------------------------------------- records


def clean(record: dict[str, Any], task: Glue) -> dict[str, Any]:
    """The texts, and the label as the hub's number. Raises ValueError for another label."""
    known = {name: number for number, name in enumerate(task.classes)}
    known |= {str(number): number for number in known.values()}
    label = known.get(str(record["label"]))
    if label is None:
        why = " (-1: GLUE's test split has no labels)" if record["label"] == -1 else ""
        raise ValueError(f"label {record['label']!r}; known: {', '.join(known)}{why}")
    return {name: record[name] for name in task.fields} | {"label": label}


# ---------------------------------------------------------------- official files


def read_file(path: Path, task: Glue) -> Records:
    """A Parquet file, or an official one of tab-separated values."""
    if path.suffix not in (".tsv", ".txt"):
        return read_records(path)
    return Records(str(path), readable(path, partial(read_tsv, task=task)), by_line=True)


def read_tsv(path: Path, task: Glue) -> Iterator[Numbered]:
    """Rows under the hub's names of their fields; a quote is a character like any other.

    Raises InputError: a column is missing, a line has too few or too many values. A question of
    QQP may hold a line end, which leaves two lines with too few; neither is a record.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        lines = enumerate((line.rstrip("\r\n") for line in file), start=1)
        header = list(task.header) or next(lines, (1, ""))[1].split("\t")
        for name in (*task.fields, "label"):
            if (column := task.columns.get(name, name)) not in header:
                raise InputError(f"{path}:1: no column {column!r}; it has {', '.join(header)}")
        fields = {column: name for name, column in task.columns.items()}
        names = [fields.get(column, column) for column in header]
        for number, line in lines:
            values = line.split("\t")
            if len(values) == len(names):
                yield number, dict(zip(names, values, strict=True))
            elif line and not (task.broken_lines and len(values) < len(names)):
                raise InputError(f"{path}:{number}: {len(values)} values; expected {len(names)}")


def read_mnli(files: Sequence[Path], task: Glue) -> Records:
    """Raises InputError where one half of the validation split is missing."""
    halves = {"_mismatched" in file.name for file in files if "matched" in file.name}
    if len(halves) == 1:
        raise InputError(
            f"{files[0].parent} has {files[0].name} but not the other half of MNLI's validation "
            "split; it needs matched and mismatched"
        )
    return read_files(files, partial(read_file, task=task))


def read_mrpc(files: Sequence[Path], task: Glue) -> Records:
    """Of Microsoft's release, GLUE calls the pairs in dev_ids.tsv the validation split.

    Raises InputError where that list is missing, or names a pair that is not there.
    """
    file = files[0]
    held_out = file.name.endswith("dev_ids.tsv")
    if not held_out and file.suffix != ".txt":
        return read_files(files, partial(read_file, task=task))
    lists = sorted(file.parent.glob("*dev_ids.tsv"))
    if not lists:
        raise InputError(
            f"{file} holds MRPC's train and validation pairs; put GLUE's dev_ids.tsv "
            "(mrpc_dev_ids.tsv), which tells them apart, next to it"
        )
    records = read_file(file.parent / "msr_paraphrase_train.txt", task)
    return replace(records, rows=_choose_pairs(records, lists[0], held_out))


def _choose_pairs(records: Records, dev_ids: Path, held_out: bool) -> Iterator[Numbered]:
    chosen = {tuple(line.split()) for line in read_lines(dev_ids)}
    found = set()
    for number, record in records.rows:
        pair = record.get("#1 ID", ""), record.get("#2 ID", "")
        found.add(pair)
        if (pair in chosen) == held_out:
            yield number, record
    if missing := chosen - found:
        raise InputError(
            f"{dev_ids} names the pair {' '.join(min(missing))}, which {records.name} does not have"
        )


# ---------------------------------------------------------------- data sets


def publish(name: str, task: Glue) -> Published:
    train: tuple[str, ...] = (*parquet_of("train"), "train.tsv")
    validation: tuple[str, ...] = (*parquet_of("validation"), "dev.tsv")
    read: Read = partial(read_files, read=partial(read_file, task=task))
    if name == "mnli":
        validation = ("validation_m*-*.parquet", "dev_m*.tsv")
        read = partial(read_mnli, task=task)
    elif name == "mrpc":
        train = (*train, "msr_paraphrase_train.txt")
        validation = (*validation, "*dev_ids.tsv")
        read = partial(read_mrpc, task=task)
    return Published(
        task=ClassificationTask(
            prompt=task.prompt,
            label_field="label",
            labels={number: f" {number}" for number in range(len(task.classes))},
            metrics=task.metrics,
        ),
        folders=(
            *(f"glue/{name}", f"nyu-mll/glue/{name}"),
            *(f"{root}/{task.folder}" for root in ("glue", "GLUE", "glue_data")),
        ),
        files={"train": train, "validation": validation},
        hub="nyu-mll/glue",
        hub_folder=name,
        beside=("*dev_ids.tsv", "msr_paraphrase_train.txt") if name == "mrpc" else (),
        read=read,
        clean=partial(clean, task=task),
        source="the files are at https://gluebenchmark.com/tasks",
    )


DATASETS = {f"glue-tvt_{name}": publish(name, task) for name, task in TASKS.items()}
