"""Exact set match and hardness. The outcomes are those of Spider's own evaluation, but for the
pairs of `BETTER`, where it is known to be wrong."""

import sqlite3
from collections import Counter
from contextlib import closing

import pytest
from spider_library import ROWS, library_text

from ssm_train.data.tasks.spider.match import judge_hardness, match_exactly
from ssm_train.data.tasks.spider.parse import read_query
from ssm_train.data.tasks.spider.schema import Schema, parse_schema

JOIN = "FROM author AS T1 JOIN book AS T2 ON T1.id = T2.author_id"
THREE = f"{JOIN} JOIN loan AS T3 ON T2.id = T3.book_id"

SAME = [
    ("SELECT name FROM author", "select NAME from Author ;"),
    ("SELECT name , country FROM author", "SELECT country, name FROM author"),
    ("SELECT DISTINCT name FROM author", "SELECT name FROM author"),
    ("SELECT count(*) FROM book", "SELECT COUNT ( * ) FROM book"),
    ("SELECT count(DISTINCT country) FROM author", "SELECT count(country) FROM author"),
    ("SELECT max(price) , min(price) FROM book", "SELECT min(price) , max(price) FROM book"),
    ("SELECT price - pages FROM book", "SELECT book.price - book.pages FROM book"),
    ("SELECT sum(price * pages) FROM book", "SELECT sum(book.price * pages) FROM book"),
    # Values
    ("SELECT name FROM author WHERE born > 1950", "SELECT name FROM author WHERE born > 1970"),
    (
        "SELECT name FROM author WHERE country = 'Chile'",
        'SELECT name FROM author WHERE country = "Norway"',
    ),
    (
        "SELECT name FROM author WHERE country = 'Chile'",
        "SELECT name FROM author WHERE country = 1",
    ),
    (
        "SELECT title FROM book WHERE pages BETWEEN 1 AND 2",
        "SELECT title FROM book WHERE pages BETWEEN 100 AND 200",
    ),
    (
        "SELECT title FROM book WHERE title LIKE '%a%'",
        "SELECT title FROM book WHERE title LIKE 'b'",
    ),
    ("SELECT title FROM book WHERE price > pages", "SELECT title FROM book WHERE price > year"),
    ("SELECT title FROM book LIMIT 3", "SELECT title FROM book LIMIT 5"),
    (
        "SELECT country FROM author GROUP BY country HAVING count(*) > 1",
        "SELECT country FROM author GROUP BY country HAVING count(*) > 9",
    ),
    # Order of conditions, of joins, of names; alias names; the column that a foreign key names
    (
        "SELECT name FROM author WHERE born > 1950 AND country = 'x'",
        "SELECT name FROM author WHERE country = 'x' AND born > 1950",
    ),
    (
        "SELECT name FROM author WHERE born > 1950 OR country = 'x'",
        "SELECT name FROM author WHERE country = 'y' OR born > 1",
    ),
    (
        f"SELECT T1.name {JOIN}",
        "SELECT a.name FROM author AS a JOIN book AS b ON a.id = b.author_id",
    ),
    (
        f"SELECT T1.name {JOIN}",
        "SELECT name FROM book AS T1 JOIN author AS T2 ON T2.id = T1.author_id",
    ),
    (f"SELECT T1.name {JOIN}", "SELECT name FROM author JOIN book ON author.id = book.author_id"),
    (f"SELECT T1.name {JOIN}", "SELECT T1.name FROM author AS T1 JOIN book AS T2 ON T1.id = T2.id"),
    (f"SELECT T1.name {JOIN}", "SELECT T1.name FROM author AS T1 JOIN book AS T2"),
    (f"SELECT T2.author_id {JOIN}", f"SELECT T1.id {JOIN}"),
    (
        f"SELECT T1.name {JOIN} GROUP BY T1.id ORDER BY count(*) DESC LIMIT 1",
        f"SELECT T1.name {JOIN} GROUP BY T2.author_id ORDER BY count(*) DESC LIMIT 1",
    ),
    (
        f"SELECT T1.name , T3.reader {THREE} WHERE T3.days > 7",
        "SELECT T3.name , T1.reader FROM loan AS T1 JOIN book AS T2 ON T1.book_id = T2.id JOIN "
        "author AS T3 ON T3.id = T2.author_id WHERE T1.days > 14",
    ),
    # ORDER BY: the last direction counts, and ASC is the default
    ("SELECT title FROM book ORDER BY year", "SELECT title FROM book ORDER BY year ASC"),
    (
        "SELECT title FROM book ORDER BY year , price DESC",
        "SELECT title FROM book ORDER BY year DESC , price DESC",
    ),
    (
        "SELECT title FROM book ORDER BY price - pages DESC LIMIT 1",
        "SELECT title FROM book ORDER BY book.price - book.pages DESC LIMIT 4",
    ),
    # Subqueries and set operations
    (
        "SELECT name FROM author WHERE id IN (SELECT author_id FROM book WHERE year > 1990)",
        "SELECT name FROM author WHERE id IN (SELECT T.author_id FROM book AS T WHERE T.year > 1)",
    ),
    (
        "SELECT title FROM book WHERE price > (SELECT avg(price) FROM book)",
        "SELECT title FROM book WHERE price > (SELECT avg(book.price) FROM book)",
    ),
    (
        "SELECT name FROM author WHERE born > 1 INTERSECT SELECT name FROM author WHERE born < 9",
        "SELECT name FROM author WHERE born > 2 INTERSECT SELECT name FROM author WHERE born < 8",
    ),
    (
        "SELECT name , born FROM author UNION SELECT reader , days FROM loan",
        "SELECT born , name FROM author UNION SELECT days , reader FROM loan",
    ),
    (
        "SELECT id FROM author EXCEPT SELECT author_id FROM book WHERE year > 1 AND price < 2",
        "SELECT id FROM author EXCEPT SELECT author_id FROM book WHERE price < 3 AND year > 4",
    ),
]

DIFFERENT = [
    ("SELECT name FROM author", "SELECT country FROM author"),
    ("SELECT name FROM author", "SELECT name , country FROM author"),
    ("SELECT name , name FROM author", "SELECT name , country FROM author"),
    ("SELECT id FROM author", "SELECT id FROM book"),
    ("SELECT * FROM author", "SELECT name FROM author"),
    ("SELECT max(price) FROM book", "SELECT min(price) FROM book"),
    ("SELECT max(price) FROM book", "SELECT price FROM book"),
    ("SELECT count(*) FROM author", "SELECT count(country) FROM author"),
    ("SELECT price - pages FROM book", "SELECT pages - price FROM book"),
    ("SELECT price - pages FROM book", "SELECT price + pages FROM book"),
    ("SELECT sum(price * pages) FROM book", "SELECT sum(price) FROM book"),
    # Conditions
    ("SELECT name FROM author WHERE born > 1", "SELECT name FROM author"),
    ("SELECT name FROM author WHERE born > 1", "SELECT name FROM author WHERE born >= 1"),
    ("SELECT name FROM author WHERE born > 1", "SELECT name FROM author WHERE id > 1"),
    ("SELECT name FROM author WHERE born != 1", "SELECT name FROM author WHERE born = 1"),
    (
        "SELECT name FROM author WHERE born > 1 AND id < 2",
        "SELECT name FROM author WHERE born > 1 OR id < 2",
    ),
    (
        "SELECT name FROM author WHERE born > 1 AND id < 2",
        "SELECT name FROM author WHERE born > 1 AND born > 1",
    ),
    ("SELECT name FROM author WHERE name LIKE 'x'", "SELECT name FROM author WHERE name = 'x'"),
    (
        "SELECT name FROM author WHERE name NOT LIKE 'x'",
        "SELECT name FROM author WHERE name LIKE 'x'",
    ),
    (
        "SELECT title FROM book WHERE pages BETWEEN 1 AND 2",
        "SELECT title FROM book WHERE pages > 1 AND pages < 2",
    ),
    # Tables
    (f"SELECT T1.name {JOIN}", "SELECT name FROM author"),
    (f"SELECT T1.name {JOIN}", f"SELECT T1.name {THREE}"),
    (f"SELECT T2.id {JOIN}", f"SELECT T1.id {JOIN}"),
    # Groups
    ("SELECT count(*) FROM book GROUP BY year", "SELECT count(*) FROM book"),
    ("SELECT count(*) FROM book GROUP BY year", "SELECT count(*) FROM book GROUP BY price"),
    (
        "SELECT count(*) FROM book GROUP BY year , price",
        "SELECT count(*) FROM book GROUP BY price , year",
    ),
    (
        "SELECT year FROM book GROUP BY year HAVING count(*) > 1",
        "SELECT year FROM book GROUP BY year",
    ),
    (
        "SELECT year FROM book GROUP BY year HAVING count(*) > 1",
        "SELECT year FROM book GROUP BY year HAVING avg(price) > 1",
    ),
    (
        "SELECT year FROM book GROUP BY year HAVING count(*) > 1 AND avg(price) > 1",
        "SELECT year FROM book GROUP BY year HAVING avg(price) > 1 AND count(*) > 1",
    ),
    # Order
    ("SELECT title FROM book ORDER BY year", "SELECT title FROM book ORDER BY year DESC"),
    ("SELECT title FROM book ORDER BY year", "SELECT title FROM book ORDER BY price"),
    ("SELECT title FROM book ORDER BY year", "SELECT title FROM book"),
    (
        "SELECT title FROM book ORDER BY year , price",
        "SELECT title FROM book ORDER BY price , year",
    ),
    (
        "SELECT title FROM book ORDER BY year DESC LIMIT 1",
        "SELECT title FROM book ORDER BY year DESC",
    ),
    ("SELECT title FROM book LIMIT 3", "SELECT title FROM book"),
    (
        "SELECT title FROM book GROUP BY title ORDER BY count(*)",
        "SELECT title FROM book GROUP BY title ORDER BY count(title)",
    ),
    # Subqueries and set operations
    (
        "SELECT name FROM author WHERE id IN (SELECT author_id FROM book)",
        "SELECT name FROM author WHERE id NOT IN (SELECT author_id FROM book)",
    ),
    (
        "SELECT name FROM author WHERE id IN (SELECT author_id FROM book)",
        "SELECT name FROM author WHERE id IN (SELECT id FROM book)",
    ),
    (
        "SELECT name FROM author WHERE id IN (SELECT author_id FROM book)",
        "SELECT name FROM author WHERE id IN (1)",
    ),
    (
        "SELECT title FROM book WHERE price > (SELECT avg(price) FROM book)",
        "SELECT title FROM book WHERE price > (SELECT max(price) FROM book)",
    ),
    (  # a subquery is compared word by word: conditions in another order, DISTINCT
        "SELECT born FROM author WHERE id IN (SELECT id FROM book WHERE year > 1 AND id < 2)",
        "SELECT born FROM author WHERE id IN (SELECT id FROM book WHERE id < 2 AND year > 1)",
    ),
    (
        "SELECT name FROM author WHERE id IN (SELECT author_id FROM book)",
        "SELECT name FROM author WHERE id IN (SELECT DISTINCT author_id FROM book)",
    ),
    (
        "SELECT name FROM author UNION SELECT reader FROM loan",
        "SELECT name FROM author INTERSECT SELECT reader FROM loan",
    ),
    (
        "SELECT name FROM author EXCEPT SELECT reader FROM loan",
        "SELECT reader FROM loan EXCEPT SELECT name FROM author",
    ),
    ("SELECT name FROM author EXCEPT SELECT reader FROM loan", "SELECT name FROM author"),
    (
        "SELECT reader FROM loan UNION SELECT name FROM author ORDER BY name",
        "SELECT reader FROM loan UNION SELECT name FROM author",
    ),
    (
        "SELECT count(*) FROM (SELECT author_id FROM book GROUP BY author_id)",
        "SELECT count(*) FROM (SELECT author_id FROM book)",
    ),
    # What is no query of this database
    ("SELECT name FROM author", "SELECT name FROM"),
    ("SELECT name FROM author", ""),
    ("SELECT name FROM author", "DROP TABLE author"),
    (
        f"SELECT T1.name {JOIN}",
        "SELECT T1.name FROM author AS T1 JOIN book AS T2 ON T1.id = T2.isbn",
    ),
    # Beyond Spider's grammar
    (f"SELECT T1.name {JOIN}", f"SELECT T1.name {JOIN.replace('JOIN', 'LEFT JOIN')}"),
    (
        "SELECT name FROM author UNION SELECT reader FROM loan",
        "SELECT name FROM author UNION ALL SELECT reader FROM loan",
    ),
]

BETTER = [
    # Spider's parser takes these for no SQL at all.
    (f"SELECT T1.name {JOIN}", f"SELECT T1.name {JOIN.replace(' AS', '')}", True),
    (f"SELECT T1.name {JOIN}", f"SELECT T1.name {JOIN.replace('JOIN', 'INNER JOIN')}", True),
    ("SELECT name FROM author WHERE id != 1", "SELECT name FROM author WHERE id <> 1", True),
    ("SELECT name FROM author WHERE id = 1", "SELECT name FROM author WHERE (id = 1)", True),
    (
        "SELECT year , count(*) FROM book GROUP BY year ORDER BY count(*)",
        "SELECT year , count(*) AS price FROM book GROUP BY year ORDER BY price",
        True,
    ),
    (
        "SELECT name FROM author WHERE name = 'x'",
        'SELECT name FROM author WHERE name = "O\'x"',
        True,
    ),
    # It does not look at what comes after the query.
    ("SELECT name FROM author LIMIT 1", "SELECT name FROM author LIMIT 1 OFFSET 2", False),
    ("SELECT name FROM author LIMIT 1", "SELECT name FROM author LIMIT 1 LIMIT 2", False),
    ("SELECT name FROM author", "SELECT name FROM author ; DROP TABLE author", False),
    # It reads `pages OR year = 3` as one column.
    (
        "SELECT title FROM book WHERE price > pages OR year = 3",
        "SELECT title FROM book WHERE price > pages",
        False,
    ),
    # It compares the values of a subquery in FROM, and the number of a LIMIT in a subquery.
    (
        "SELECT count(*) FROM (SELECT title FROM book WHERE year > 1)",
        "SELECT count(*) FROM (SELECT title FROM book WHERE year > 2)",
        True,
    ),
    (
        "SELECT title FROM book WHERE id IN (SELECT id FROM book ORDER BY year LIMIT 1)",
        "SELECT title FROM book WHERE id IN (SELECT id FROM book ORDER BY year LIMIT 2)",
        True,
    ),
    # An alias holds for the whole text: here T1 is the loan, also in the first query.
    (
        "SELECT T1.title FROM book AS T1 EXCEPT SELECT T1.reader FROM loan AS T1",
        "SELECT T2.title FROM book AS T2 EXCEPT SELECT T1.reader FROM loan AS T1",
        True,
    ),
]

HARDNESS = [
    ("SELECT name FROM author", "easy"),
    ("SELECT count(*) FROM book WHERE year = 1990", "easy"),
    ("SELECT DISTINCT country FROM author ORDER BY country", "easy"),
    (f"SELECT T1.name {JOIN}", "easy"),
    ("SELECT sum(price) FROM book LIMIT 1", "easy"),
    ("SELECT count(*) FROM (SELECT title FROM book WHERE year > 1)", "easy"),
    ("SELECT name , country FROM author", "medium"),
    ("SELECT max(price) , min(price) FROM book", "medium"),
    ("SELECT title FROM book WHERE year > 1 AND price < 2", "medium"),
    ("SELECT title FROM book WHERE title LIKE '%a%'", "medium"),
    ("SELECT title FROM book ORDER BY price DESC LIMIT 1", "medium"),
    ("SELECT country , count(*) FROM author GROUP BY country", "medium"),
    (f"SELECT T1.name {JOIN} WHERE T2.year > 1990", "medium"),
    ("SELECT title FROM book WHERE title NOT LIKE 'a' AND year != 1", "medium"),
    ("SELECT title FROM book WHERE title LIKE 'a' OR title LIKE 'b'", "extra"),
    ("SELECT avg(price) , max(pages) FROM book WHERE year > 1 AND id > 2", "hard"),
    (f"SELECT T1.name {JOIN} GROUP BY T1.id HAVING count(*) > 1", "medium"),
    (f"SELECT T1.name {JOIN} WHERE T2.year > 1 ORDER BY T2.price", "hard"),
    ("SELECT title FROM book WHERE year > 1 ORDER BY price LIMIT 1", "hard"),
    ("SELECT year FROM book GROUP BY year HAVING count(*) > 1 AND avg(price) > 2", "easy"),
    ("SELECT year FROM book GROUP BY year HAVING count(*) > 1 OR avg(price) > 2", "medium"),
    (
        "SELECT year , count(*) FROM book GROUP BY year HAVING count(*) > 1 AND max(id) > 2",
        "medium",
    ),
    ("SELECT title FROM book GROUP BY title ORDER BY max(price) - min(price) DESC", "medium"),
    ("SELECT name FROM author WHERE id IN (SELECT author_id FROM book)", "hard"),
    ("SELECT name FROM author EXCEPT SELECT reader FROM loan", "hard"),
    ("SELECT reader FROM loan UNION SELECT name FROM author WHERE born > 1 ORDER BY name", "hard"),
    ("SELECT name , born FROM author WHERE id NOT IN (SELECT author_id FROM book)", "extra"),
    ("SELECT name FROM author WHERE id IN (SELECT id FROM book) AND born > 1", "extra"),
    (f"SELECT T1.name {JOIN} WHERE T2.year > 1 EXCEPT SELECT name FROM author", "extra"),
    (
        "SELECT title FROM book WHERE year BETWEEN (SELECT min(year) FROM book) "
        "AND (SELECT max(year) FROM book)",
        "extra",
    ),
    (
        f"SELECT T1.name , count(*) {THREE} WHERE T3.days > 7 GROUP BY T1.id "
        "ORDER BY count(*) DESC LIMIT 3",
        "extra",
    ),
    ("SELECT count(*) , year FROM book WHERE price > 1 AND id > 1 GROUP BY year , pages", "hard"),
]


@pytest.fixture(scope="module")
def schema(tmp_path_factory) -> Schema:
    return parse_schema(library_text(tmp_path_factory.mktemp("spider")))


def same(gold: str, prediction: str, schema: Schema) -> bool:
    right, answer = read_query(gold, schema), read_query(prediction, schema)
    assert right is not None, gold
    return answer is not None and match_exactly(answer, right, schema)


@pytest.mark.parametrize(("gold", "prediction"), SAME)
def test_the_same_query_in_other_words(schema, gold, prediction):
    assert same(gold, prediction, schema)
    assert same(prediction, gold, schema)


@pytest.mark.parametrize(("gold", "prediction"), DIFFERENT)
def test_another_query(schema, gold, prediction):
    assert not same(gold, prediction, schema)


@pytest.mark.parametrize(("gold", "prediction", "expected"), BETTER)
def test_where_spiders_own_evaluation_is_wrong(schema, gold, prediction, expected):
    assert same(gold, prediction, schema) == expected


def test_every_query_is_the_same_as_itself_and_no_other_of_the_list_is(schema):
    golds = list(dict.fromkeys(query for query, _ in HARDNESS))
    for gold in golds:
        assert [other for other in golds if same(gold, other, schema)] == [gold]


@pytest.mark.parametrize(("query", "level"), HARDNESS)
def test_hardness(schema, query, level):
    assert judge_hardness(read_query(query, schema)) == level


def test_the_list_has_every_level():
    assert set(Counter(level for _, level in HARDNESS)) == {"easy", "medium", "hard", "extra"}


def test_the_gold_queries_run():
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(ROWS)
        for gold in (*(p[0] for p in (*SAME, *DIFFERENT, *BETTER)), *(q for q, _ in HARDNESS)):
            connection.execute(gold)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ";", "-- name", "name", "42", "SELECT", "SELECT FROM author"),
        *(
            "SELECT name , FROM author",
            "SELECT name FROM author WHERE",
            "SELECT count( FROM author",
        ),
        *("SELECT name FROM author GROUP BY", "SELECT name FROM author WHERE name = 'x"),
        *("SELECT 1 ; SELECT 2", "SELECT name FROM author )", "(SELECT name FROM author)"),
        *("EXPLAIN SELECT 1", "PRAGMA user_version", "INSERT INTO author VALUES (1, 2, 3, 4)"),
        *("SELECT name FROM author WHERE id = 1 = =", "SELECT \x00", "SELECT '\ud800'"),
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "SELECT name FROM author WHERE " + " AND ".join(["id = 1"] * 3000),
    ],
    ids=range(24),
)
def test_what_is_no_query(schema, text):
    assert read_query(text, schema) is None


def test_what_spider_lacks_is_read_all_the_same(schema):
    for query in (
        "WITH old AS (SELECT name FROM author WHERE born < 1960) SELECT name FROM old",
        "SELECT upper(name) || '!' , CASE WHEN born > 1 THEN 1 ELSE 2 END FROM author",
        "SELECT name FROM author WHERE EXISTS (SELECT * FROM book WHERE author_id = author.id)",
        "SELECT name FROM author WHERE NOT (born > 1 AND id > 2) AND born IS NOT NULL",
        "SELECT T1.name FROM author T1 , book WHERE T1.id IN (1, 2) AND 3 < T1.born",
        "SELECT sum(days) OVER (ORDER BY reader) FROM loan NATURAL JOIN book",
        "SELECT x.title FROM (SELECT title FROM book) AS x",
    ):
        assert same(query, query, schema)
        assert not same(query, query.replace("name", "country").replace("title", "year")
                        .replace("reader", "book_id"), schema)  # fmt: skip


def test_aliases_do_not_matter_in_what_spider_lacks(schema):
    assert same("SELECT round(T1.born) FROM author AS T1", "SELECT round(born) FROM author", schema)
