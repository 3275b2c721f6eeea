"""The Spider task: what a record becomes, and the scores of predictions on a real database."""

import json
import re

import pytest
from pydantic import ValidationError
from spider_library import library_text, write_database

from ssm_train.data.tasks.spider import SpiderTask, execute, tidy
from ssm_train.errors import InputError

TASK = SpiderTask()
EXACT = SpiderTask(metrics=["exact_match"])


@pytest.fixture
def record(tmp_path) -> dict:
    return {
        "question": " Who's\nthere in  '71 ? ",
        "query": "SELECT name ,  born\tFROM author",
        "db_id": "library",
        "schema": library_text(tmp_path),
        "database": write_database(tmp_path / "library.sqlite"),
    }


def score(task: SpiderTask, record: dict, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """The metrics of (gold, prediction) pairs."""
    rendered = [task.render(record | {"query": gold}, training=False)[0] for gold, _ in pairs]
    return task.score(
        [prediction for _, prediction in pairs],
        [example.references for example in rendered],
        [example.context for example in rendered],
    )


def test_an_example(record):
    (example,) = TASK.render(record, training=False)
    assert example.prompt == (
        "Write the SQLite query that answers the question.\n"
        f"Tables: {record['schema']}\nQuestion: Who's there in '71 ?\nQuery:"
    )
    assert example.label == " SELECT name , born FROM author"
    assert example.references == ("SELECT name , born FROM author",)
    known = {field: record[field] for field in ("db_id", "schema", "database")}
    assert json.loads(example.context) == known
    assert [segment.learnt for segment in example.segments] == [False, False, False, True]
    (learnt,) = TASK.render(record, training=True)
    assert learnt == example._replace(context="")


def test_white_space_in_quotes_is_kept():
    query = "SELECT  a \n FROM t\tWHERE b = 'x  ''  y'  AND c = \"p  q\"  AND d = 'it  s "
    assert tidy(query) == ("SELECT a FROM t WHERE b = 'x  ''  y' AND c = \"p  q\" AND d = 'it s")


def test_scores(record):
    pairs = [
        ("SELECT name FROM author", " select name from author \n"),  # both
        ("SELECT name FROM author", "SELECT country FROM author"),  # neither
        ("SELECT title FROM book WHERE id > 3", "SELECT title FROM book WHERE id > 4"),  # exact
        ("SELECT name , born FROM author", "SELECT born , name FROM author WHERE 1"),  # rows
        ("SELECT title FROM book ORDER BY price LIMIT 2", "Rain , Salt"),  # no query
        ("SELECT id FROM book EXCEPT SELECT book_id FROM loan", "SELECT 2 UNION SELECT 4"),  # rows
    ]
    assert score(TASK, record, pairs) == {
        "execution": 3 / 6,
        "execution_easy": 1 / 3,
        "execution_medium": 1 / 2,
        "execution_hard": 1.0,
        "exact_match": 2 / 6,
        "exact_match_easy": 2 / 3,
        "exact_match_medium": 0.0,
        "exact_match_hard": 0.0,
        "invalid_sql": 1 / 6,
    }
    assert list(score(EXACT, record, pairs)) == [
        *("exact_match", "exact_match_easy", "exact_match_medium", "exact_match_hard"),
        "invalid_sql",
    ]
    assert score(TASK, record, [(gold, gold) for gold, _ in pairs])["execution"] == 1


def test_the_order_of_rows_counts_with_order_by_outside_subqueries(record):
    for gold, ordered in (
        ("SELECT id FROM author ORDER BY id", True),
        ("SELECT 0 UNION SELECT id FROM author ORDER BY 1", True),
        ("SELECT id FROM author WHERE id IN (SELECT id FROM book ORDER BY id)", False),
        ("SELECT id FROM (SELECT id FROM author ORDER BY id)", False),
        ("SELECT id FROM author WHERE name != 'order by'", False),
    ):
        backwards = f"SELECT * FROM ({gold}) ORDER BY 1 DESC"
        assert score(TASK, record, [(gold, backwards)])["execution"] == (not ordered)


def test_exact_match_needs_no_database(record):
    record["database"] = ""
    pairs = [("SELECT name FROM author", "SELECT name FROM author")]
    assert score(EXACT, record, pairs)["exact_match"] == 1
    message = (
        "execution needs the database of db_id 'library', and the record names none; put "
        "Spider's databases there, or measure without: task: {type: spider, metrics: [exact_match]}"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        TASK.render(record, training=False)
    assert TASK.render(record, training=True)
    context = EXACT.render(record, training=False)[0].context
    with pytest.raises(InputError, match=re.escape(message)):  # the file went away since
        TASK.score([pairs[0][0]], [[pairs[0][0]]], [context])


def test_a_database_is_opened_once_and_a_gold_query_runs_once(record, tmp_path, monkeypatch):
    opened, ran = [], []
    open_read_only = execute.open_read_only

    def watch(path: str):
        connection = open_read_only(path)
        opened.append(path)
        connection.set_trace_callback(ran.append)
        return connection

    monkeypatch.setattr(execute, "open_read_only", watch)
    other = record | {"database": write_database(tmp_path / "other.sqlite")}
    records = [record, other] * 5
    gold, answers = "SELECT name , born FROM author", [f"SELECT {i}" for i in range(10)]
    contexts = [TASK.render(r, training=False)[0].context for r in records]
    assert TASK.score(answers, [[gold]] * 10, contexts)["execution"] == 0
    assert opened == [record["database"], other["database"]]
    assert ran.count(gold) == 2 and len(ran) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query": "SELECT name FROM"},
            "library: the gold query 'SELECT name FROM' is no SQL query",
        ),
        ({"query": "SELECT name FROM book"}, "fails: no such column: name; replace the database"),
        (
            {"database": "nowhere.sqlite"},
            "nowhere.sqlite is no file; put Spider",
        ),
        ({"schema": "author (name)"}, "schema: 'author (name)' is neither a table"),
    ],
)
def test_bad_data_is_found_in_scoring(record, changes, message):
    record |= changes
    with pytest.raises(InputError, match=re.escape(message)):
        score(TASK, record, [(record["query"], "SELECT 1")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": None}, "field 'query' is null 'None'; expected text"),
        ({"query": " "}, "field 'query' is empty"),
        ({"question": ""}, "field 'question' is empty"),
        ({"db_id": 3}, "field 'db_id' is a number '3'; expected text"),
        ({"database": ["x"]}, "field 'database' is a list"),
    ],
)
def test_bad_records(record, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        TASK.render(record | changes, training=True)


def test_a_field_is_missing(record):
    del record["schema"]
    with pytest.raises(InputError, match="no field 'schema'; it has 'question', 'query', 'db_id'"):
        TASK.render(record, training=True)


def test_bad_settings():
    with pytest.raises(ValidationError, match="unknown metric 'exact'; known: execution, exact_"):
        SpiderTask(metrics=["exact"])
    with pytest.raises(ValidationError, match="greater than 0"):
        SpiderTask(seconds=0)
