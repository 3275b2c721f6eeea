"""Execution accuracy on SQLite: a prediction is right when its rows are those of the gold query.

Databases are only read, whatever the query says; its time and the memory it takes are bounded."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from ssm_train.errors import InputError

MAX_GOLD_ROWS = 1_000_000
MAX_VALUE_BYTES = 1_000_000  # of one text or blob
STEPS_BETWEEN_CHECKS = 1_000  # of SQLite's virtual machine: some 10 us, if none is slow

READING = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
REFUSED_FUNCTIONS = {"load_extension", "fts3_tokenizer"}  # they reach code outside the database

# Also what is no query at all: a null character, half a surrogate pair, two statements.
FAILURES = (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError)

Row = tuple[Any, ...]


class QueryFailed(Exception):
    """A query that SQLite refuses, or that takes too long; says why."""


@dataclass(frozen=True)
class Answer:
    """What a gold query returns."""

    rows: list[Row]
    columns: int

    @cached_property
    def bags(self) -> list[Row]:
        """The values of each row, sorted."""
        return [sort_values(row) for row in self.rows]


class Database:
    """An open SQLite file. `seconds`: time limit of each query.

    Raises InputError: no such file, not a SQLite database, an empty one.
    """

    def __init__(self, path: str, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self._deadline = monotonic() + seconds
        self._answers: dict[str, Answer] = {}
        self._connection = open_read_only(path)
        self._connection.set_progress_handler(self._is_late, STEPS_BETWEEN_CHECKS)

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()

    def agree(self, prediction: str, gold: str, *, ordered: bool) -> bool:
        """Whether the rows are the same: as a multiset, or in the same order if `ordered`, with
        the columns in any order.

        The definition of the test-suite evaluation (Zhong et al. 2020, arXiv 2010.02840), which
        replaced that of the first Spider script: it compared columns by their names in the query,
        always in order, so that no other way to write a query counted. Queries run as they are
        written, as its `--keep_distinct` has it. Values are equal as in Python: 1 is 1.0, not "1".
        Raises InputError for a gold query that fails; a prediction that does so is wrong.
        """
        answer = self.answer(gold)
        if prediction == gold:
            return True
        try:
            with self._run(prediction) as cursor:
                rows = take_alike(cursor, answer, ordered)
        except QueryFailed:
            return False
        return rows is not None and are_same(rows, answer.rows, ordered)

    def answer(self, gold: str) -> Answer:
        """The gold query's rows, found once. Raises InputError."""
        if gold not in self._answers:
            try:
                with self._run(gold) as cursor:
                    columns = len(cursor.description or ())
                    self._answers[gold] = Answer(cursor.fetchmany(MAX_GOLD_ROWS + 1), columns)
            except QueryFailed as error:
                raise InputError(
                    f"{self.path}: the gold query {gold!r} fails: {error}; replace the database or "
                    "leave out the record"
                ) from None
            if len(self._answers[gold].rows) > MAX_GOLD_ROWS:
                raise InputError(
                    f"{self.path}: the gold query {gold!r} returns more than {MAX_GOLD_ROWS:,} "
                    "rows; leave out the record"
                )
        return self._answers[gold]

    @contextmanager
    def _run(self, query: str) -> Iterator[sqlite3.Cursor]:
        """The rows, read while the time runs. Raises QueryFailed."""
        self._deadline = monotonic() + self.seconds
        cursor = self._connection.cursor()
        try:
            cursor.execute(query)
            if cursor.description is None:
                raise QueryFailed("it is no query")
            yield cursor
        except FAILURES as error:
            late = f"it takes more than {self.seconds:g} s (task.seconds)"
            raise QueryFailed(late if self._is_late() else str(error)) from None
        finally:
            cursor.close()

    def _is_late(self) -> bool:
        return monotonic() > self._deadline


def open_read_only(path: str) -> sqlite3.Connection:
    """A connection that can read this one file and nothing else. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path} is no file; put the SQLite database there")
    connection = sqlite3.connect(
        Path(path).resolve().as_uri() + "?mode=ro", uri=True, isolation_level=None
    )
    try:
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA temp_store = FILE")  # what a query sorts does not fill memory
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    except sqlite3.Error as error:
        connection.close()
        raise InputError(
            f"{path} cannot be read as a SQLite database: {error}; download it again"
        ) from None
    if not tables:
        connection.close()
        raise InputError(f"{path} is an empty database; download it again")
    connection.text_factory = decode
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    connection.set_authorizer(authorize)
    return connection


def decode(text: bytes) -> str:
    """UTF-8; other bytes are kept apart, so that different texts stay different."""
    return text.decode("utf-8", errors="surrogateescape")


def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Reading is allowed, and calling functions that stay within the database."""
    refused = action == sqlite3.SQLITE_FUNCTION and second in REFUSED_FUNCTIONS
    return sqlite3.SQLITE_OK if action in READING and not refused else sqlite3.SQLITE_DENY


# ---------------------------------------------------------------- comparison


def take_alike(cursor: sqlite3.Cursor, answer: Answer, ordered: bool) -> list[Row] | None:
    """The rows of a prediction, or None as soon as they cannot be those of the gold query, so that
    never more than that many are kept."""
    if answer.rows and len(cursor.description) != answer.columns:
        return None
    left = Counter() if ordered else Counter(answer.bags)
    rows: list[Row] = []
    for row in cursor:
        if len(rows) == len(answer.rows):
            return None
        bag = sort_values(row)
        if ordered:
            if bag != answer.bags[len(rows)]:
                return None
        elif left[bag] == 0:
            return None
        else:
            left[bag] -= 1
        rows.append(row)
    return rows if len(rows) == len(answer.rows) else None


def sort_values(row: Row) -> Row:
    """In an order that is the same for equal values: null, numbers, texts, blobs."""
    return tuple(sorted(row, key=_rank))


def _rank(value: Any) -> tuple[int, Any]:
    if value is None:
        return 0, 0
    return (2 if isinstance(value, str) else 3 if isinstance(value, bytes) else 1), value


def are_same(rows: list[Row], gold: list[Row], ordered: bool) -> bool:
    """Whether some order of the columns makes the rows equal."""
    if rows == gold:
        return True
    columns, gold_columns = list(zip(*rows, strict=True)), list(zip(*gold, strict=True))
    if ordered:
        return Counter(columns) == Counter(gold_columns)

    def extend(chosen: tuple[int, ...]) -> bool:
        """Whether the chosen columns, as the first ones, can be part of such an order."""
        mine = Counter(zip(*(columns[i] for i in chosen), strict=True))
        if mine != Counter(zip(*gold_columns[: len(chosen)], strict=True)):
            return False
        if len(chosen) == len(columns):
            return True
        candidates = {columns[i]: i for i in range(len(columns)) if i not in chosen}
        return any(extend((*chosen, i)) for i in candidates.values())

    return extend(())
