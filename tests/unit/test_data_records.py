"""Reading records: every format gives the same ones; every defect is one line with its place."""

import json
from pathlib import Path

import pytest

from ssm_train.data.records import read_records
from ssm_train.errors import InputError

ROWS = [{"text": "a, b", "label": "0"}, {"text": "ü\n'c'", "label": "1"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_format_gives_the_same_records(tmp_path):
    import pyarrow
    from pyarrow import parquet

    quoted = 'text,label\n"a, b",0\n"ü\n\'c\'",1\n'
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    paths = {
        write(tmp_path / "x.jsonl", lines(ROWS)): [1, 2],
        write(tmp_path / "bom.jsonl", "\ufeff" + lines(ROWS)): [1, 2],
        write(tmp_path / "blank.ndjson", lines(ROWS).replace("\n", "\n\n", 1)): [1, 3],
        write(tmp_path / "x.json", json.dumps(ROWS, indent=1)): [1, 2],
        write(tmp_path / "x.csv", quoted): [2, 4],
        write(tmp_path / "x.tsv", "text\tlabel\na, b\t0\n\"ü\n'c'\"\t1\n"): [2, 4],
        tmp_path / "x.parquet": [1, 2],
    }
    for path, numbers in paths.items():
        assert list(read_records(path).rows) == list(zip(numbers, ROWS, strict=True)), path


def test_records_are_read_lazily(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"a": 1}\n{broken\n')
    assert next(iter(read_records(path).rows)) == (1, {"a": 1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": }\n', "x.jsonl:3: malformed JSON at column 7"),
        ("x.jsonl", '{"a": 1}\n[1]\n', "x.jsonl:2: a record is a list"),
        ("x.jsonl", '{"a": 1}\nnull\n', "x.jsonl:2: a record is null"),
        ("x.jsonl", '{"a": ' + "9" * 5000 + "}\n", "x.jsonl:1: unusable JSON"),
        ("x.jsonl", "[" * 100_000, "x.jsonl:1: unusable JSON"),
        ("x.jsonl", '{"a": "\\ud83d"}', "x.jsonl:1: unusable JSON: 'utf-8' codec can't encode"),
        ("x.jsonl", b'{"a": "\xff"}\n', "x.jsonl is not UTF-8"),
        ("x.json", '[{"a": 1},\n {"a" 2}]', "x.json:2: malformed JSON"),
        ("x.json", '{"a": 1}', "holds an object; expected a list"),
        (
            "x.json",
            '{"a": 1}\n{"a": 2}',
            "x.json:2: malformed JSON at column 1: Extra data (one rec",
        ),
        ("x.json", '[{"a": 1}, 3]', "x.json, record 2: a record is a number"),
        ("x.csv", "a,b\n1,2\n1\n", "x.csv:3: 1 values; expected 2, from 'a' to 'b'"),
        ("x.csv", "a,a\n1,2\n", "x.csv:1: a column name occurs twice"),
        ("x.csv", 'a,b\n1,"2', "x.csv:2: malformed CSV"),
        ("x.parquet", "no parquet", "x.parquet is not a readable Parquet file"),
        ("x.txt", "text", "unknown format '.txt'; known: .csv .json .jsonl"),
    ],
)
def test_defects_are_named_with_their_place(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=".*") as caught:
        list(read_records(path).rows)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_emoji_in_two_halves_is_a_character(tmp_path):
    path = write(tmp_path / "x.jsonl", json.dumps({"a": "\U0001f600"}))
    assert b"\\ud83d" in path.read_bytes()
    assert list(read_records(path).rows) == [(1, {"a": "\U0001f600"})]


def test_a_long_document_in_a_table(tmp_path):
    path = write(tmp_path / "x.csv", "text\n" + "a b " * 50_000 + "\n")
    ((_, record),) = read_records(path).rows
    assert record == {"text": "a b " * 50_000}


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(InputError, match="nowhere.jsonl does not exist"):
        read_records(tmp_path / "nowhere.jsonl")
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(InputError, match="d.jsonl is not a file"):
        read_records(tmp_path / "d.jsonl")
