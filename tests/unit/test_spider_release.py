"""Spider's release as it is unpacked: records find their schema and their database."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from spider_library import write_database, write_tables

from ssm_train.data import DataSettings
from ssm_train.data.sources import check_data, find_source, load_task_data, why_no_test
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError

NAMES = ["name", "Country", "born", "ID"]


def make_record(i: int) -> dict[str, Any]:
    column = NAMES[i % len(NAMES)]
    query = f"SELECT {column} FROM Author WHERE ID < {i}"
    return {"db_id": "library", "question": f"{column} of authors below {i} ?", "query": query}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "spider"
    (folder / "database" / "library").mkdir(parents=True)
    write_database(folder / "database" / "library" / "library.sqlite")
    write_tables(folder / "tables.json")
    for name, count in {"train_spider.json": 20, "dev.json": 5}.items():
        records = json.dumps([make_record(i) for i in range(count)])
        (folder / name).write_text(records, encoding="utf-8")
    return folder


def settings(release: Path, **changes: Any) -> DataSettings:
    return DataSettings(data="spider-tvt", data_root=str(release.parent), **changes)


def test_the_release_has_the_splits_of_a_tvt_data_set(release: Path) -> None:
    spider = settings(release)
    assert check_data(spider, ("train", "val", "test")).type == "spider"
    counts = {s: len(list(find_source(spider, s).open().rows)) for s in ("train", "val", "test")}
    assert counts == {"train": 16, "val": 4, "test": 5}
    _, record = next(iter(find_source(spider, "test").open().rows))
    assert record["schema"].startswith("Author : ") and "loan.book_id = book.id" in record["schema"]
    assert record["database"] == str(release / "database" / "library" / "library.sqlite")


def test_what_is_loaded_can_be_scored(release: Path) -> None:
    spider = settings(release)
    words = ["SELECT FROM WHERE name Country born ID Author < 0 1 2 3 4"]
    tokenizer = build_tokenizer(words, {"type": "word"})
    for _ in range(2):  # the second time from the kept tokens
        data = load_task_data(spider, tokenizer, "test")
        references = [data.references(i) for i in range(len(data))]
        contexts = [data.context(i) for i in range(len(data))]
        golds = [gold for (gold,) in references]
        values = data.task.score(golds, references, contexts)
        assert values["execution"] == values["exact_match"] == 1 and values["invalid_sql"] == 0
        none = data.task.score([""] * len(data), references, contexts)
        assert none["execution"] == 0 and none["invalid_sql"] == 1


def test_other_tables_are_other_data(release: Path) -> None:
    spider, tokenizer = settings(release), build_tokenizer(["Author writer name"], {"type": "word"})
    before = load_task_data(spider, tokenizer, "train").example_ids(0).tolist()
    text = (release / "tables.json").read_text().replace('"Author"', '"writer"')
    (release / "tables.json").write_text(text)
    assert load_task_data(spider, tokenizer, "train").example_ids(0).tolist() != before


def test_what_is_missing_is_named(release: Path, tmp_path: Path) -> None:
    spider = settings(release)
    (release / "database" / "library" / "library.sqlite").unlink()
    with pytest.raises(InputError, match=r"dev.json, record 1: execution needs the database of"):
        check_data(spider, ("train", "test"))
    exact = settings(release, task={"type": "spider", "metrics": ["exact_match"]})
    assert check_data(exact, ("train", "test")).metrics == ["exact_match"]
    (release / "tables.json").write_text("[]")
    with pytest.raises(InputError, match=r"db_id 'library' is not in .*tables.json"):
        check_data(spider)
    (release / "tables.json").unlink()
    with pytest.raises(InputError, match="there is no tables.json beside"):
        check_data(spider)
    (release / "dev.json").unlink()
    assert why_no_test(spider)
    with pytest.raises(InputError, match="spider-tvt is read from files: put them into a folder"):
        check_data(DataSettings(data="spider-tvt"))
