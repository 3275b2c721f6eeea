"""The schema of a database: read from Spider's tables.json, written as one line for the prompt,
and read back from that line when answers are scored."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from ssm_train.data.records import json_type
from ssm_train.errors import InputError

_PLAIN = re.compile(r"[^\W\d]\w*")  # a name that needs no quotes
_NAME = r'("(?:[^"]|"")*"|[^\W\d]\w*)'
_DOTTED = re.compile(rf"{_NAME}\.{_NAME}")
_COLUMN = re.compile(rf"{_NAME} {_NAME}( key)?")
_WORD = re.compile(r'(?:"(?:[^"]|"")*"|[^\s"])+')


class Name(NamedTuple):
    """A column and its table."""

    table: str
    column: str


@dataclass(frozen=True)
class Column:
    name: str
    type: str
    """text, number, time, boolean or others."""
    key: bool = False
    """Whether it is in the primary key."""


@dataclass(frozen=True)
class Table:
    name: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Schema:
    """Names as the database writes them."""

    tables: tuple[Table, ...]
    foreign_keys: tuple[tuple[Name, Name], ...] = ()
    """A column, and the one that it refers to."""

    @cached_property
    def columns(self) -> dict[str, frozenset[str]]:
        """Table -> its columns, in lower case."""
        return {
            table.name.lower(): frozenset(column.name.lower() for column in table.columns)
            for table in self.tables
        }

    @cached_property
    def twins(self) -> dict[Name, Name]:
        """Column in a foreign key -> the first column of its group, in lower case.

        As Spider's evaluation does, a key joins the first group that has either of its columns,
        and two groups that a later key connects stay two.
        """
        names = [
            Name(table.name.lower(), column.name.lower())
            for table in self.tables
            for column in table.columns
        ]
        place = {name: i for i, name in enumerate(names)}
        groups: list[set[int]] = []
        for pair in self.foreign_keys:
            ends = {place[Name(name.table.lower(), name.column.lower())] for name in pair}
            group = next((group for group in groups if group & ends), None)
            if group is None:
                groups.append(group := set())
            group |= ends
        return {names[i]: names[min(group)] for group in groups for i in group}


# ---------------------------------------------------------------- as text


def linearise(schema: Schema) -> str:
    """`singer : id number key , name text | song : id number key , singer number | song.singer =
    singer.id`: tables with their columns, types and primary keys, then the foreign keys.

    Names that are no plain words stand in double quotes, as queries need them.
    """
    tables = [
        " ".join((_quote(table.name), ":", " , ".join(map(_describe, table.columns)))).rstrip()
        for table in schema.tables
    ]
    keys = [
        " = ".join(f"{_quote(name.table)}.{_quote(name.column)}" for name in pair)
        for pair in schema.foreign_keys
    ]
    return " | ".join(tables + keys)


@lru_cache(maxsize=256)
def parse_schema(text: str) -> Schema:
    """The schema that `linearise` wrote. Raises InputError where the text is none."""
    tables: list[Table] = []
    keys: list[tuple[Name, Name]] = []
    for words in _split(_WORD.findall(text), "|"):
        if len(words) >= 2 and words[1] == ":":
            columns = [_COLUMN.fullmatch(" ".join(c)) for c in _split(words[2:], ",")]
            if all(columns):
                found = [Column(_unquote(c[1]), _unquote(c[2]), bool(c[3])) for c in columns if c]
                tables.append(Table(_unquote(words[0]), tuple(found)))
                continue
        ends = [_DOTTED.fullmatch(word) for word in words[::2]]
        if len(words) == 3 and words[1] == "=" and all(ends):
            first, second = (Name(_unquote(end[1]), _unquote(end[2])) for end in ends if end)
            keys.append((first, second))
            continue
        raise InputError(
            f"schema: {' '.join(words)[:60]!r} is neither a table (`name : column type , column "
            "type key`) nor a foreign key (`table.column = table.column`)"
        )
    schema = Schema(tuple(tables), tuple(keys))
    known = {Name(table.name, column.name) for table in tables for column in table.columns}
    for name in (name for pair in keys for name in pair):
        if name not in known:
            raise InputError(f"schema: a foreign key names {'.'.join(name)!r}, which no table has")
    if not tables or (written := linearise(schema)) != text:
        raise InputError(
            f"schema: {text[:60]!r} "
            + (f"has to be {written[:60]!r}" if tables else "has no table")
        )
    return schema


def _describe(column: Column) -> str:
    return f"{_quote(column.name)} {_quote(column.type)}" + " key" * column.key


def _quote(name: str) -> str:
    if _PLAIN.fullmatch(name):
        return name
    return '"' + name.replace('"', '""') + '"'


def _unquote(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


def _split(words: Sequence[str], separator: str) -> list[list[str]]:
    runs = groupby(words, lambda word: word == separator)
    return [list(run) for is_separator, run in runs if not is_separator]


# ---------------------------------------------------------------- tables.json


class _Entry(BaseModel):
    """What is read of one database; the other fields are for people."""

    model_config = ConfigDict(strict=True)

    db_id: str
    table_names_original: list[str]
    column_names_original: list[tuple[int, str]]
    column_types: list[str]
    primary_keys: list[int]
    foreign_keys: list[tuple[int, int]]


def read_schemas(path: Path) -> dict[str, Schema]:
    """`db_id` -> schema, of Spider's tables.json (one entry for each database).

    Raises InputError with the entry and the field: unreadable, malformed, a number out of range.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON text: {error}; download it again") from None
    if not isinstance(entries, list):
        raise InputError(f"{path} holds {json_type(entries)}; expected a list of databases")
    schemas: dict[str, Schema] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, entry {number}"
        database = _validate(entry, where)
        where += f" ({database.db_id})"
        if database.db_id in schemas:
            raise InputError(f"{where}: db_id occurs twice; keep one of the entries")
        schemas[database.db_id] = _build_schema(database, where)
    return schemas


def _validate(entry: Any, where: str) -> _Entry:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object for a database, found {json_type(entry)}")
    try:
        return _Entry.model_validate_json(json.dumps(entry))
    except ValidationError as error:
        first = error.errors()[0]
        field, *places = map(str, first["loc"])
        field += "".join(f"[{place}]" for place in places)
        if first["type"] == "missing":
            raise InputError(f"{where}: field {field!r} is missing") from None
        found = str(first["input"])[:40]
        raise InputError(f"{where}: field {field!r} is {found!r}: {first['msg']}") from None


def _build_schema(entry: _Entry, where: str) -> Schema:
    columns, types = entry.column_names_original, entry.column_types
    if len(types) != len(columns):
        raise InputError(
            f"{where}: field 'column_types' has {len(types)} types for {len(columns)} columns of "
            "'column_names_original'"
        )
    for field, used, known in (
        ("column_names_original", [table for table, _ in columns], range(-1, _count(entry))),
        ("primary_keys", entry.primary_keys, _real_columns(entry)),
        ("foreign_keys", [i for pair in entry.foreign_keys for i in pair], _real_columns(entry)),
    ):
        if wrong := [i for i in used if i not in known]:
            what = "table" if field == "column_names_original" else "column"
            raise InputError(f"{where}: field {field!r} refers to {what} {wrong[0]}: there is none")
    keys = set(entry.primary_keys)
    tables = [
        Table(
            table,
            tuple(
                Column(name, types[i], i in keys)
                for i, (owner, name) in enumerate(columns)
                if owner == number
            ),
        )
        for number, table in enumerate(entry.table_names_original)
    ]
    names = [Name(entry.table_names_original[owner], name) for owner, name in columns]
    pairs = tuple((names[a], names[b]) for a, b in entry.foreign_keys)
    return Schema(tuple(tables), pairs)


def _count(entry: _Entry) -> int:
    return len(entry.table_names_original)


def _real_columns(entry: _Entry) -> set[int]:
    """Places of the columns that belong to a table; `*` belongs to none."""
    return {i for i, (table, _) in enumerate(entry.column_names_original) if table >= 0}
