"""Published data sets: where the files of their splits are, below `data_root` or on the hub, and
how the splits of a run are made of theirs."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ssm_train.data.records import Numbered, Records, expand_home, read_records
from ssm_train.errors import InputError

if TYPE_CHECKING:  # the tasks' files import this one
    from ssm_train.data.tasks.task import Task

SPLIT_SEED = 123
HELD_OUT = 0.2  # share of the official training split that is validation data of a -tvt data set

Clean = Callable[[dict[str, Any]], dict[str, Any] | None]
Read = Callable[[Sequence[Path]], Records]


@dataclass(frozen=True)
class Part:
    """A split of a run: an official split, or a part of one."""

    official: str
    share: Literal["all", "kept", "held_out"] = "all"
    """kept and held_out: 80 % and 20 % of it, drawn with seed 123."""


TVT = {"train": Part("train", "kept"), "val": Part("train", "held_out"), "test": Part("validation")}
"""Train and validation from the official training split; test is the official validation split."""

OFFICIAL = {"train": Part("train"), "val": Part("validation"), "test": Part("test")}
"""The official splits as they are."""


def parquet_of(split: str) -> tuple[str, ...]:
    """Where the hub's data sets keep the Parquet files of a split."""
    return f"{split}-*.parquet", f"data/{split}-*.parquet"


@dataclass(frozen=True)
class JoinedRecords(Records):
    """Records of several files in turn, each named by its own file in messages."""

    starts: list[tuple[int, Records]] = field(default_factory=list)
    """The files begun so far, each with the number before its first record."""

    def where(self, number: int) -> str:
        start, records = self.starts[bisect_left(self.starts, number, key=itemgetter(0)) - 1]
        return records.where(number - start)


def read_files(files: Sequence[Path], read: Callable[[Path], Records] = read_records) -> Records:
    """The records of several files in turn."""
    parts = [read(file) for file in files]
    if len(parts) == 1:
        return parts[0]
    starts: list[tuple[int, Records]] = []

    def rows() -> Iterator[Numbered]:
        start = last = 0
        for records in parts:
            starts.append((start, records))
            for number, record in records.rows:
                last = start + number
                yield last, record
            start = last

    names = [file.name for file in files]
    shown = ", ".join(names if len(names) <= 3 else [names[0], "...", names[-1]])
    return JoinedRecords(f"{files[0].parent}/{{{shown}}}", rows(), starts=starts)


@dataclass(frozen=True)
class Published:
    """A published data set."""

    task: Task
    folders: tuple[str, ...]
    """Names its folder may have below `data_root`; the first that exists."""
    files: Mapping[str, tuple[str, ...]]
    """Official split -> patterns of its files in the folder; the first pattern that matches."""
    hub: str | None = None
    """Repository of the hub with the same files; None: there is none with all of them."""
    hub_revision: str | None = None
    """Branch of it; None: the main one."""
    hub_folder: str = ""
    """Folder in that repository that stands for `folders`."""
    splits: Mapping[str, Part] = field(default_factory=lambda: TVT)
    """Split of a run -> what it is made of."""
    read: Read = read_files
    """The records of a split's files."""
    clean: Clean | None = None
    """Brings a record of any layout into the shape that the task reads; None leaves it out
    (no label)."""
    beside: tuple[str, ...] = ()
    """Patterns of files in the folder that the records are made with too."""
    holds_paths: bool = False
    """Whether the examples say where their files are, so that moved files are other examples."""
    source: str = ""
    """Where a user gets the files, for messages."""


@dataclass(frozen=True)
class FoundSplit:
    """A split whose files are there."""

    published: Published
    part: Part
    folder: Path
    files: tuple[Path, ...]
    size: int | None = None
    """Only so many of the examples."""

    @property
    def depends_on(self) -> tuple[Path, ...]:
        """All files that decide what the records are."""
        beside = (file for p in self.published.beside for file in match_files(self.folder, p))
        return tuple(dict.fromkeys((*self.files, *beside)))

    def open(self) -> Records:
        """The records, in an order that is always the same. Raises InputError while reading."""
        records = self.open_official()
        if self.part.share == "all" and self.size is None:
            return records
        kept = list(records.rows)
        if self.part.share != "all":
            kept = [kept[i] for i in share_of(len(kept), self.part.share)]
        return replace(records, rows=subset(kept, self.size))

    def open_official(self) -> Records:
        """All records of the official split, one by one. Raises InputError while reading."""
        records = self.published.read(self.files)
        return replace(records, rows=self._clean(records))

    def _clean(self, records: Records) -> Iterator[Numbered]:
        clean = self.published.clean
        for number, record in records.rows:
            if clean is None:
                yield number, record
                continue
            try:
                cleaned = clean(record)
            except KeyError as error:
                raise InputError(
                    f"{records.where(number)}: no field {error}; it has "
                    f"{', '.join(map(repr, record)) or 'none'}"
                ) from None
            except (TypeError, ValueError, AttributeError, IndexError) as error:
                raise InputError(f"{records.where(number)}: {error}") from None
            if cleaned is not None:
                yield number, cleaned


def share_of(count: int, share: Literal["kept", "held_out"]) -> list[int]:
    """Places of 80 % or of the other 20 % of `count` records.

    Those of `datasets.Dataset.train_test_split(test_size=0.2, seed=123)`, so that results stay
    comparable with runs of other programs.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    held_out = math.ceil(HELD_OUT * count)
    return (order[:held_out] if share == "held_out" else order[held_out:]).tolist()


def subset(rows: list[Numbered], size: int | None) -> list[Numbered]:
    """`size` of the rows, always the same ones; all where there are fewer."""
    if size is None or size >= len(rows):
        return rows
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    return [rows[i] for i in order[:size]]


def find_split(
    published: Published, name: str, split: str, data_root: str | None, size: int | None
) -> FoundSplit:
    """The files of a run's split. Raises InputError: no such split, no folder, no files."""
    if split not in published.splits:
        raise InputError(f"{name} has no split {split!r}; it has {', '.join(published.splits)}")
    part = published.splits[split]
    folder = find_folder(published, name, data_root)
    return FoundSplit(published, part, folder, find_files(published, name, folder, part), size)


def find_folder(published: Published, name: str, data_root: str | None) -> Path:
    """Below `data_root`, else the hub's files, downloaded or cached."""
    if data_root is not None:
        root = expand_home(data_root, "data_root")
        for folder in published.folders:
            if (root / folder).is_dir():
                return root / folder
        raise InputError(
            f"data: {name}: data_root {data_root} has none of the folders "
            f"{', '.join(published.folders)}"
            + (f"; {published.source}" if published.source else "")
        )
    if published.hub is None:
        raise InputError(
            f"data: {name} is read from files: put them into a folder {published.folders[0]} and "
            f"set data_root (SSM_TRAIN_DATA) to the directory above it; {published.source}"
        )
    patterns = [
        f"{published.hub_folder}/{pattern}".lstrip("/")
        for choices in (*published.files.values(), published.beside)
        for pattern in choices
    ]
    root = download(published.hub, patterns, name, published.hub_revision)
    return root / published.hub_folder


def find_files(published: Published, name: str, folder: Path, part: Part) -> tuple[Path, ...]:
    """Those of the first pattern that matches. Raises InputError where none does."""
    patterns = published.files[part.official]
    for pattern in patterns:
        if found := match_files(folder, pattern):
            return found
    raise InputError(
        f"data: {name}: {folder} has no file for the {part.official} split; expected "
        f"{' or '.join(patterns)}"
    )


def match_files(folder: Path, pattern: str) -> tuple[Path, ...]:
    """The files that a pattern names, in order of their names; hidden ones are not meant."""
    return tuple(
        sorted(p for p in folder.glob(pattern) if p.is_file() and not p.name.startswith("."))
    )


def download(
    repository: str, patterns: Sequence[str], name: str, revision: str | None = None
) -> Path:
    """The files of a hub data set, from the cache where they are there. Raises InputError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository, repo_type="dataset", revision=revision, allow_patterns=list(patterns)
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"data: {name}: the hub's {repository} cannot be read ({reason}); check the name, the "
            "network and HF_HUB_OFFLINE, or set data_root to a local copy"
        ) from None
