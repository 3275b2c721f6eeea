"""Reads records (mappings of fields) from JSONL, JSON, CSV, TSV and Parquet, one at a time, each
with the number that an error message needs to name it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ssm_train.errors import InputError

Numbered = tuple[int, dict[str, Any]]
Placed = tuple[str, dict[str, Any]]
"""A record and what an error message calls its place."""
T = TypeVar("T")

OF_LINES = " (.jsonl is one record a line; a list of records is .json)"
LONGEST_CELL = 2**31 - 1  # characters of a CSV value; Python's own limit is 131,072
HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Records:
    """Numbered records of one source. `rows` can be gone through once."""

    name: str
    """Path or data set name, as the user knows it."""
    rows: Iterable[Numbered]
    by_line: bool = False
    """Whether the numbers are lines of a file; else they count records from 1."""

    def placed(self) -> Iterator[Placed]:
        """The rows with their places."""
        for number, record in self.rows:
            yield self.where(number), record

    def where(self, number: int) -> str:
        return f"{self.name}:{number}" if self.by_line else f"{self.name}, record {number}"


def read_records(path: Path) -> Records:
    """The records of a file, whose suffix says the format; read lazily.

    Raises InputError: no such file, not a file, unknown suffix, and while reading: unreadable,
    malformed (with the line), a record that is not a mapping.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; give the path of a data file")
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a {' '.join(sorted(READERS))} file")
    if path.suffix not in READERS:
        raise InputError(
            f"{path}: unknown format {path.suffix!r}; known: {' '.join(sorted(READERS))}"
        )
    reader, by_line = READERS[path.suffix]
    return Records(str(path), readable(path, reader), by_line)


def expand_home(path: str | Path, key: str) -> Path:
    """`~` as the home directory. Raises InputError, naming the config's `key`, without one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(
            f"{key}: {path} needs a home directory, and there is none; give a whole path"
        ) from None


def readable(path: Path, reader: Callable[[Path], Iterator[T]]) -> Iterator[T]:
    """What the reader yields. Raises InputError for a file that cannot be read or is not UTF-8."""
    try:
        yield from reader(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}; convert it") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises InputError as `readable` does."""

    def reader(path: Path) -> Iterator[str]:
        with path.open(encoding="utf-8-sig") as lines:
            yield from (line.strip() for line in lines if line.strip())

    return list(readable(path, reader))


def _read_jsonl(path: Path) -> Iterator[Numbered]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                record = _parse_json(line, f"{path}:{number}", hint=OF_LINES)
                yield number, _mapping(record, f"{path}:{number}", hint=OF_LINES)


def _read_json(path: Path) -> Iterator[Numbered]:
    values = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(values, list):
        raise InputError(
            f"{path} holds {json_type(values)}; expected a list of records "
            "(one record a line is .jsonl)"
        )
    for number, record in enumerate(values, start=1):
        yield number, _mapping(record, f"{path}, record {number}")


def _parse_json(text: str, where: str, hint: str = "") -> Any:
    try:
        values = json.loads(text)
        if HALF_A_CHARACTER.search(text):
            json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if "\n" in text.strip() else ""
        if line and error.msg == "Extra data":
            hint = " (one record a line is .jsonl)"
        raise InputError(
            f"{where}{line}: malformed JSON at column {error.colno}: {error.msg}{hint}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise InputError(f"{where}: unusable JSON: {error}") from None
    return values


def _mapping(record: Any, where: str, hint: str = "") -> dict[str, Any]:
    if not isinstance(record, dict):
        what = json_type(record)
        raise InputError(f"{where}: a record is {what}; expected {{field: value}}{hint}")
    return record


def read_table(
    path: Path, delimiter: str = ",", header: Sequence[str] = (), *, strict: bool = True
) -> Iterator[Numbered]:
    """Rows of a CSV file under the names of its first line, or of `header`; empty lines are none.

    `strict`: a quote within a quoted value is an error unless it is doubled. Raises InputError with
    the line: malformed, more or fewer values than names, a name twice.
    """
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.reader(lines, delimiter=delimiter, strict=strict)
        try:
            names = list(header) or next(filter(None, table), [])
            if len(set(names)) < len(names):
                raise InputError(f"{path}:1: a column name occurs twice in {names}")
            for values in table:
                if len(values) == len(names):
                    yield table.line_num, dict(zip(names, values, strict=True))
                elif values:
                    raise InputError(
                        f"{path}:{table.line_num}: {len(values)} values; "
                        f"expected {len(names)}, from {names[0]!r} to {names[-1]!r}"
                    )
        except csv.Error as error:
            raise InputError(f"{path}:{table.line_num}: malformed CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow
    from pyarrow import parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as table:
            for part in table.iter_batches(batch_size=1_024):  # a record may be an image
                for record in part.to_pylist():
                    number += 1
                    yield number, record
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from None


READERS: dict[str, tuple[Callable[[Path], Iterator[Numbered]], bool]] = {
    ".jsonl": (_read_jsonl, True),
    ".ndjson": (_read_jsonl, True),
    ".json": (_read_json, False),
    ".csv": (read_table, True),
    ".tsv": (partial(read_table, delimiter="\t"), True),
    ".parquet": (_read_parquet, False),
}
"""Suffix -> reader, and whether its numbers are lines."""


def json_type(value: Any) -> str:
    """What JSON calls the type of `value`, for messages; Parquet has types that JSON has not."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
