"""Where a split's records come from (a file, a directory, a generated data set), which task reads
them, and both in one call: `load_task_data`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ssm_train.data import DataSettings
from ssm_train.data.examples import TokenizedDataset, render_records, tokenize_records
from ssm_train.data.records import READERS, Records, read_records
from ssm_train.data.tasks import TASKS, build_task
from ssm_train.data.tasks.quickstart import (
    generate_base,
    generate_quickstart,
    vocabulary_texts,
)
from ssm_train.data.tasks.text import Task
from ssm_train.errors import InputError, near

Generate = Callable[[str], Iterator[dict[str, Any]]]

DATASETS: dict[str, tuple[str, Generate]] = {
    "quickstart": ("quickstart", generate_quickstart),
    "quickstart_base": ("quickstart", generate_base),
}
"""Name -> its task, and its records by split (train, val, test)."""

SPLITS = {
    "train": ("train",),
    "val": ("val", "validation", "valid", "dev", "eval"),
    "test": ("test",),
}
"""Split -> the names that it has in a directory of files, the first one found."""


def load_task_data(
    settings: DataSettings,
    tokenizer: Any,
    split: str,
    *,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenizedDataset:
    """The examples of `split`: train (too long ones dropped, see `dropped`), val or test.

    `limit`: only the first so many records. Raises InputError; the place of bad records is named.
    """
    training = split == "train"
    max_length = settings.max_length
    if settings.packing:
        max_length = min(max_length or settings.tokens_per_batch, settings.tokens_per_batch)
    return tokenize_records(
        open_split(settings, split),
        find_task(settings),
        tokenizer,
        training=training,
        max_length=max_length,
        limit=limit,
        num_workers=settings.num_data_workers,
        progress=progress,
    )


def find_task(settings: DataSettings) -> Task:
    """The task that `task:` says, else that of the named data set. Raises InputError."""
    if settings.task is not None:
        return build_task(settings.task)
    name, _ = _split_name(settings.data)
    if name in DATASETS:
        return TASKS[DATASETS[name][0]]
    raise InputError(
        f"task is missing: how do the fields of {settings.data} become prompt and label? "
        f"Give a name ({', '.join(TASKS)}) or a mapping with type, prompt, ... (docs/data.md)"
    )


def open_split(settings: DataSettings, split: str) -> Records:
    """The records of a split, to be read once. Raises InputError when there are none such."""
    assert split in SPLITS, split
    name, key = settings.data, "data"
    if split == "val":
        if settings.val_data is not None:
            name, key = settings.val_data, "val_data"
        split = settings.val_data_split
    elif split == "test" and settings.test_data is not None:
        name, key = settings.test_data, "test_data"
    if key == "data" and split != "train" and Path(name).is_file():
        raise InputError(
            f"data is the one file {name}, which has no {split!r} split; set val_data (test_data)"
        )
    return open_records(name, split, key)


def has_split(settings: DataSettings, split: str) -> bool:
    """Whether the config names data for `split`, or its `data` brings some along.

    Data that is named is there to be read: if it cannot be, that is an error later.
    """
    if {"val": settings.val_data, "test": settings.test_data}.get(split) is not None:
        return True
    try:
        open_split(settings, split)
    except InputError:
        return split == "train"
    return True


def open_records(name: str, split: str, key: str = "data") -> Records:
    """Records of a data set name, a directory's split or a file; `key` is the config's."""
    dataset, size = _split_name(name)
    if dataset in DATASETS:
        if split not in SPLITS:
            raise InputError(f"{name} has no split {split!r}; known: {', '.join(SPLITS)}")
        rows = enumerate(DATASETS[dataset][1](split), start=1)
        return Records(f"{name} ({split})", islice(rows, size if split == "train" else None))
    path = Path(name)
    if path.is_dir():
        return read_records(_file_of_split(path, split))
    if not path.exists():
        hint = near(name, DATASETS) or f"; data set names: {', '.join(DATASETS)}"
        raise InputError(f"{key}: {name} is neither a file nor a data set name{hint}")
    return read_records(path)


def check_data(settings: DataSettings, splits: tuple[str, ...] = ("train", "val")) -> Task:
    """Finds a user's mistakes before a model is loaded: the task, the files, and the first record
    of each split. Raises InputError; returns the task."""
    task = find_task(settings)
    for split in splits:
        records = open_split(settings, split)
        first = next(iter(records.rows), None)
        if first is None:
            raise InputError(f"{records.name} holds no records")
        next(render_records(task, records, [first], training=split == "train"))
    return task


def training_texts(settings: DataSettings) -> Iterator[str]:
    """What a new tokenizer is built from: prompts and labels of the training records."""
    if _split_name(settings.data)[0] in DATASETS:
        yield from vocabulary_texts()
    task, records = find_task(settings), open_split(settings, "train")
    for _, example in render_records(task, records, records.rows, training=True):
        yield example.prompt
        yield example.label


def _split_name(name: str) -> tuple[str, int | None]:
    """`quickstart_300` is the first 300 training records of `quickstart`."""
    match = re.fullmatch(r"(.+)_([1-9]\d*)", name)
    if match and match[1] in DATASETS:
        return match[1], int(match[2])
    return name, None


def _file_of_split(directory: Path, split: str) -> Path:
    stems = SPLITS.get(split, (split,))
    for stem in stems:
        for suffix in READERS:
            if (path := directory / f"{stem}{suffix}").is_file():
                return path
    raise InputError(
        f"{directory} has no {split!r} file; expected {' or '.join(stems)} with one of "
        f"{' '.join(READERS)}"
    )
