"""Spider's tables.json: read, written as one line, read back, and what is refused."""

import copy
import re

import pytest
from spider_library import ENTRY, library_text, write_tables

from ssm_train.data.tasks.spider.schema import (
    Column,
    Name,
    Schema,
    Table,
    linearise,
    parse_schema,
    read_schemas,
)
from ssm_train.errors import InputError


def entry(**changes) -> dict:
    return copy.deepcopy(ENTRY) | changes


def test_the_library(tmp_path):
    schemas = read_schemas(write_tables(tmp_path / "tables.json", ENTRY, entry(db_id="other")))
    assert list(schemas) == ["library", "other"]
    assert schemas["library"] == Schema(
        tables=(
            Table(
                "Author",
                (
                    Column("ID", "number", key=True),
                    Column("name", "text"),
                    Column("Country", "text"),
                    Column("born", "number"),
                ),
            ),
            Table(
                "book",
                (
                    Column("id", "number", key=True),
                    Column("title", "text"),
                    Column("author_id", "number"),
                    Column("year", "time"),
                    Column("price", "number"),
                    Column("pages", "number"),
                ),
            ),
            Table(
                "loan",
                (
                    Column("book_id", "number"),
                    Column("reader", "text"),
                    Column("days", "number"),
                ),
            ),
        ),
        foreign_keys=(
            (Name("book", "author_id"), Name("Author", "ID")),
            (Name("loan", "book_id"), Name("book", "id")),
        ),
    )
    assert linearise(schemas["library"]) == library_text(tmp_path)


def test_as_one_line(tmp_path):
    assert library_text(tmp_path) == (
        "Author : ID number key , name text , Country text , born number | "
        "book : id number key , title text , author_id number , year time , price number , "
        "pages number | loan : book_id number , reader text , days number | "
        "book.author_id = Author.ID | loan.book_id = book.id"
    )


def test_any_name_is_read_back():
    odd = ("Home Town", '18_49_"Rating"', "a.b", "|", ",", ":", "=", "key", "%_x (m)", "größe", " ")
    columns = tuple(Column(name, kind, name == "key") for name in odd for kind in ("text", "key"))
    tables = (Table("a b", columns), Table("key", (Column("key", "key", True),)), Table("none", ()))
    keys = tuple((Name("a b", name), Name("key", "key")) for name in odd)
    schema = Schema(tables, keys)
    assert parse_schema(linearise(schema)) == schema
    assert '"Home Town" text , "Home Town" key , "18_49_""Rating""" text' in linearise(schema)


def test_columns_that_a_foreign_key_connects_have_one_name():
    schema = parse_schema(
        "A : x number key , y number | b : x number | c : x number | d : x number | "
        "b.x = A.x | c.x = d.x | b.x = c.x"
    )
    first = Name("a", "x")
    other = Name("c", "x")  # as in Spider's evaluation, the last key does not join the two groups
    assert schema.twins == {
        first: first,
        Name("b", "x"): first,
        other: other,
        Name("d", "x"): other,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "schema: '' has no table"),
        (" | ", "schema: ' | ' has no table"),
        ("singer", "'singer' is neither a table (`name : column type , column type key`)"),
        ("singer : id", "'singer : id' is neither"),
        ("singer : id number | song.singer", "'song.singer' is neither"),
        ("singer : id number | song.singer = singer", "'song.singer = singer' is neither"),
        ('singer : "id number', "has to be 'singer : id number'"),
        ("singer : id  number", "schema: 'singer : id  number' has to be 'singer : id number'"),
        ("CREATE TABLE singer (id number)", "is neither"),
        ("singer : id number | song.x = singer.id", "a foreign key names 'song.x', which no table"),
    ],
)
def test_text_that_is_no_schema(text, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        parse_schema(text)
    assert "\n" not in str(caught.value)


def without(field: str) -> dict:
    return {key: value for key, value in ENTRY.items() if key != field}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([7], "entry 1: expected an object for a database, found a number"),
        ([without("db_id")], "entry 1: field 'db_id' is missing"),
        ([ENTRY, without("foreign_keys")], "entry 2: field 'foreign_keys' is missing"),
        ([entry(db_id=3)], "entry 1: field 'db_id' is '3': Input should be a valid string"),
        ([ENTRY, ENTRY], "entry 2 (library): db_id occurs twice"),
        ([entry(primary_keys=["1"])], "field 'primary_keys[0]' is '1': Input should be a valid"),
        ([entry(column_names_original=[[0]])], "field 'column_names_original[0][1]' is missing"),
        ([entry(table_names_original="t")], "field 'table_names_original' is 't': Input should be"),
        ([entry(primary_keys=[99])], "(library): field 'primary_keys' refers to column 99: there"),
        ([entry(foreign_keys=[[1, 0]])], "field 'foreign_keys' refers to column 0: there is none"),
        ([entry(foreign_keys=[[1]])], "field 'foreign_keys[0][1]' is missing"),
        ([entry(table_names_original=["t"])], "field 'column_names_original' refers to table 1"),
        ([entry(column_types=["text"])], "field 'column_types' has 1 types for 14 columns"),
    ],
)
def test_malformed_entries(tmp_path, entries, message):
    path = write_tables(tmp_path / "tables.json", *entries)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_schemas(path)
    assert str(caught.value).startswith(f"{path}, entry ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{", "is no JSON text: "),
        (b"{}", "holds an object; expected a list of databases"),
        (b"\xff\xfe", "is no JSON text: "),
        (b"[" * 100_000, "is no JSON text: "),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_broken_file(tmp_path, content, message):
    path = tmp_path / "tables.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path} {message}")) as caught:
        read_schemas(path)
    assert "\n" not in str(caught.value)
