"""Execution: the same rows, and no harm done, on a real SQLite database."""

import hashlib
import random
import re
import sqlite3
from contextlib import closing
from itertools import permutations

import pytest
from spider_library import write_database

from ssm_train.data.tasks.spider import execute
from ssm_train.data.tasks.spider.execute import Database, are_same
from ssm_train.errors import InputError

NEVER_ENDS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"


@pytest.fixture
def path(tmp_path):
    return write_database(tmp_path / "library #1?.sqlite")


@pytest.fixture
def library(path):
    with Database(path, seconds=10) as database:
        yield database


def digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


@pytest.mark.parametrize(
    ("gold", "prediction", "expected"),
    [
        # A multiset of rows
        ("SELECT name FROM author", "SELECT name FROM author ORDER BY name DESC", True),
        ("SELECT title FROM book", "SELECT DISTINCT title FROM book", False),
        ("SELECT title FROM book", "SELECT title FROM book UNION ALL SELECT 'Rain'", False),
        ("SELECT title FROM book WHERE id < 3", "SELECT title FROM book WHERE id > 3", False),
        ("SELECT id FROM book WHERE id < 4", "SELECT id FROM book WHERE id < 3", False),
        ("SELECT id FROM book WHERE id < 4", "SELECT id FROM book WHERE id < 5", False),
        # Columns in any order, but all of them, and with the rows kept together
        ("SELECT name , born FROM author", "SELECT born , name FROM author", True),
        ("SELECT id , year , pages FROM book", "SELECT pages , id , year FROM book", True),
        ("SELECT name , born FROM author", "SELECT name FROM author", False),
        ("SELECT name FROM author", "SELECT name , name FROM author", False),
        ("SELECT 1 , 2 UNION ALL SELECT 2 , 1", "SELECT 1 , 2 UNION ALL SELECT 1 , 2", False),
        ("SELECT 1 , 2 UNION ALL SELECT 2 , 1", "SELECT 2 , 1 UNION ALL SELECT 1 , 2", True),
        ("SELECT 1 , 2 UNION ALL SELECT 3 , 4", "SELECT 1 , 4 UNION ALL SELECT 3 , 2", False),
        # Values
        ("SELECT 1 , 2.0", "SELECT 1.0 , 2", True),
        ("SELECT 2", "SELECT '2'", False),
        ("SELECT 'a'", "SELECT x'61'", False),
        ("SELECT 'a'", "SELECT 'A'", False),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", False),
        ("SELECT born FROM author", "SELECT born FROM author WHERE born IS NOT NULL", False),
        ("SELECT born FROM author WHERE id = 3", "SELECT NULL", True),
        ("SELECT born FROM author WHERE id = 3", "SELECT 0", False),
        ("SELECT born FROM author WHERE id = 3", "SELECT ''", False),
        ("SELECT 1 , NULL , 'x' , x'00'", "SELECT x'00' , 'x' , NULL , 1", True),
        # No rows: then the columns are not known either
        ("SELECT name FROM author WHERE id > 9", "SELECT id FROM book WHERE id > 9", True),
        ("SELECT name FROM author WHERE id > 9", "SELECT id , year FROM book WHERE id > 9", True),
        ("SELECT name FROM author WHERE id > 9", "SELECT NULL", False),
        ("SELECT name FROM author WHERE id > 9", "", False),
        ("SELECT name FROM author WHERE id > 9", "-- nothing", False),
        ("SELECT name FROM author", "SELECT name FROM author WHERE id > 9", False),
        # What fails is wrong
        ("SELECT name FROM author", "SELECT name FROM", False),
        ("SELECT name FROM author", "SELECT name FROM writer", False),
        ("SELECT name FROM author", "SELECT name FROM author ; SELECT 1", False),
        ("SELECT name FROM author", "SELECT \x00", False),
        ("SELECT name FROM author", "SELECT '\ud800'", False),
        ("SELECT name FROM author", "SELECT sum(9223372036854775807) FROM author , book", False),
    ],
)
def test_rows(library, gold, prediction, expected):
    assert library.agree(prediction, gold, ordered=False) == expected
    assert library.agree(gold, gold, ordered=True)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("SELECT name , id FROM author ORDER BY id DESC", True),
        ("SELECT id , name FROM author ORDER BY name DESC", True),
        ("SELECT id , name FROM author ORDER BY id", False),
        ("SELECT id , name FROM author", False),
        ("SELECT id , country FROM author ORDER BY id DESC", False),
        ("SELECT id , name FROM author ORDER BY id DESC LIMIT 3", False),
        ("SELECT name , id FROM author UNION ALL SELECT 'x' , 0 ORDER BY 2 DESC", False),
    ],
)
def test_ordered_rows(library, prediction, expected):
    gold = "SELECT id , name FROM author ORDER BY id DESC"
    assert library.agree(prediction, gold, ordered=True) == expected


def test_every_order_of_the_columns_and_no_other_change_is_the_same():
    draw = random.Random(0)
    for _ in range(60):
        width, height = draw.randint(1, 5), draw.randint(1, 6)
        gold = [tuple(draw.choice((0, 1, None, "a")) for _ in range(width)) for _ in range(height)]
        places = draw.sample(range(width), width)
        rows = [tuple(row[i] for i in places) for row in gold]
        assert are_same(rows, gold, ordered=True)
        draw.shuffle(rows)
        assert are_same(rows, gold, ordered=False)
        i, j = draw.randrange(height), draw.randrange(width)
        changed = [list(row) for row in rows]
        changed[i][j] = draw.choice((0, 1, None, "a"))
        rows = [tuple(row) for row in changed]
        for ordered in (True, False):
            assert are_same(rows, gold, ordered) == any(
                rows == [tuple(r[k] for k in order) for r in gold]
                if ordered
                else sorted(map(repr, rows))
                == sorted(repr(tuple(r[k] for k in order)) for r in gold)
                for order in permutations(range(width))
            )


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE book",
        "DELETE FROM book",
        "INSERT INTO author VALUES (9, 'x', 'y', 1)",
        "UPDATE book SET price = 0",
        "CREATE TABLE t (a)",
        "CREATE TEMP TABLE t AS SELECT * FROM book",
        "ALTER TABLE book RENAME TO books",
        "ATTACH DATABASE '{other}' AS other",
        "VACUUM",
        "VACUUM INTO '{other}'",
        "REINDEX",
        "ANALYZE",
        "BEGIN EXCLUSIVE",
        "SAVEPOINT s",
        "PRAGMA query_only = OFF",
        "PRAGMA journal_mode = WAL",
        "PRAGMA user_version = 7",
        "PRAGMA writable_schema = ON",
        "SELECT load_extension('{other}')",
        "SELECT name FROM author ; DROP TABLE book",
        "WITH x AS (SELECT 1) INSERT INTO author SELECT 9, 'x', 'y', 1",
    ],
)
def test_nothing_is_written_and_no_other_file_is_reached(path, tmp_path, query):
    before, files = digest(path), sorted(tmp_path.iterdir())
    with Database(path, seconds=10) as library:
        prediction = query.format(other=tmp_path / "other")
        assert not library.agree(prediction, "SELECT name FROM author", ordered=False)
        with pytest.raises(InputError, match="the gold query"):
            library.answer(prediction)
        assert library.agree("SELECT title FROM book", "SELECT title FROM book", ordered=False)
    assert digest(path) == before
    assert sorted(tmp_path.iterdir()) == files


def test_writing_is_refused_twice(path):
    """Without the authorizer, too."""
    with closing(execute.open_read_only(path)) as connection:
        connection.set_authorizer(None)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM book")


@pytest.mark.parametrize(
    "query",
    [
        NEVER_ENDS,
        "SELECT count(*) FROM " + " , ".join(f"book AS b{i}" for i in range(30)),
        "SELECT b0.id FROM " + " , ".join(f"book AS b{i}" for i in range(30)) + " ORDER BY b9.id",
        NEVER_ENDS.replace("max(x)", "count(DISTINCT x)"),
    ],
)
def test_a_query_that_never_ends_is_ended(path, query):
    with Database(path, seconds=0.2) as library:
        assert not library.agree(query, "SELECT 1", ordered=False)
        reason = re.escape("takes more than 0.2 s (task.seconds)")
        with pytest.raises(InputError, match=reason):
            library.answer(query)
        assert library.agree("SELECT 1", "SELECT 1", ordered=False)  # the connection is as before


def test_endless_rows_and_endless_text_are_not_kept(path, monkeypatch):
    with Database(path, seconds=60) as library:
        rows = NEVER_ENDS.replace("max(x)", "x % 2")
        assert not library.agree(rows, "SELECT 1 UNION ALL SELECT 0", ordered=False)
        assert not library.agree(rows, "SELECT 1 UNION ALL SELECT 0", ordered=True)
        text = "SELECT group_concat(hex(zeroblob(1000000))) FROM book , loan"
        assert not library.agree(text, "SELECT 1", ordered=False)
        with pytest.raises(InputError, match="too big"):
            library.answer(text)
        monkeypatch.setattr(execute, "MAX_GOLD_ROWS", 4)
        assert len(library.answer("SELECT id FROM author").rows) == 4
        with pytest.raises(InputError, match="returns more than 4 rows"):
            library.answer("SELECT id FROM book")


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (a TEXT, b TEXT)")
        connection.execute("INSERT INTO t VALUES (CAST(x'e9' AS TEXT), CAST(x'e8' AS TEXT))")
        connection.commit()
    with Database(str(path), seconds=10) as database:
        assert database.agree("SELECT t.a FROM t", "SELECT a FROM t", ordered=False)
        assert not database.agree("SELECT b FROM t", "SELECT a FROM t", ordered=False)


def test_a_gold_query_runs_once(library):
    first = library.answer("SELECT name FROM author")
    assert library.answer("SELECT name FROM author") is first
    assert sorted(first.rows) == [("Ada",), ("Bo",), ("Cy",), ("Di",)]


def test_databases_that_are_missing_or_broken(tmp_path, path):
    cases = {
        "missing": "is no file; put the SQLite database there",
        "folder": "is no file",
        "text": "cannot be read as a SQLite database: file is not a database; download it again",
        "empty": "is an empty database; download it again",
    }
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("CREATE TABLE book;" * 100)
    (tmp_path / "empty").write_bytes(b"")
    for name, message in cases.items():
        with pytest.raises(InputError, match=re.escape(f"{tmp_path / name} {message}")) as caught:
            Database(str(tmp_path / name), seconds=10)
        assert "\n" not in str(caught.value)


def test_a_damaged_page_is_found_by_the_gold_query(path):
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    message = "the gold query 'SELECT name FROM author' fails: database disk image is malformed"
    with Database(path, seconds=10) as library, pytest.raises(InputError, match=message) as caught:
        library.answer("SELECT name FROM author")
    assert str(caught.value).startswith(path)


def test_a_gold_query_that_fails(library):
    with pytest.raises(InputError, match="fails: no such table: writer; replace the database or"):
        library.agree("SELECT 1", "SELECT name FROM writer", ordered=False)
