"""A small library as a Spider database: its entry of tables.json, and the SQLite file."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from ssm_train.data.tasks.spider.schema import linearise, read_schemas

ENTRY = {
    "db_id": "library",
    "table_names_original": ["Author", "book", "loan"],
    "table_names": ["author", "book", "loan"],
    "column_names_original": [
        *([-1, "*"], [0, "ID"], [0, "name"], [0, "Country"], [0, "born"]),
        *([1, "id"], [1, "title"], [1, "author_id"], [1, "year"], [1, "price"], [1, "pages"]),
        *([2, "book_id"], [2, "reader"], [2, "days"]),
    ],
    "column_names": [],
    "column_types": [
        *("text", "number", "text", "text", "number"),
        *("number", "text", "number", "time", "number", "number"),
        *("number", "text", "number"),
    ],
    "primary_keys": [1, 5],
    "foreign_keys": [[7, 1], [11, 5]],
}

ROWS = """
CREATE TABLE Author (ID INTEGER PRIMARY KEY, name TEXT, Country TEXT, born INTEGER);
CREATE TABLE book (id INTEGER PRIMARY KEY, title TEXT, author_id INTEGER, year INTEGER,
                   price REAL, pages INTEGER, FOREIGN KEY (author_id) REFERENCES Author (ID));
CREATE TABLE loan (book_id INTEGER, reader TEXT, days INTEGER,
                   FOREIGN KEY (book_id) REFERENCES book (id));
INSERT INTO Author VALUES (1, 'Ada', 'Chile', 1950), (2, 'Bo', 'Norway', 1960),
                          (3, 'Cy', 'Chile', NULL), (4, 'Di', 'Kenya', 1971);
INSERT INTO book VALUES (1, 'Rain', 1, 1990, 10.0, 100), (2, 'Salt', 1, 1995, 12.5, 200),
                        (3, 'Tide', 2, 1995, 10.0, 150), (4, 'Umber', 3, 2001, NULL, 90),
                        (5, 'Rain', 2, 2003, 8.0, 200);
INSERT INTO loan VALUES (1, 'Kim', 7), (1, 'Lou', 14), (3, 'Kim', 7), (5, 'Max', 21);
"""


def write_database(path: Path) -> str:
    """Writes the SQLite file; returns its path as records have it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(ROWS)
    return str(path)


def write_tables(path: Path, *entries: object) -> Path:
    path.write_text(json.dumps(list(entries or (ENTRY,))), encoding="utf-8")
    return path


def library_text(directory: Path) -> str:
    """The schema as records have it."""
    return linearise(read_schemas(write_tables(directory / "tables.json"))["library"])
