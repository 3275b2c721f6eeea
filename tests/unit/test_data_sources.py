"""From a config's words to examples: names, files, directories, splits, and what is refused."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from ssm_train.data import DataSettings
from ssm_train.data.cache import default_cache_dir
from ssm_train.data.sources import (
    SPLITS,
    check_data,
    find_source,
    find_task,
    load_task_data,
    training_texts,
    why_no_test,
)
from ssm_train.data.tasks import PUBLISHED
from ssm_train.data.tasks.quickstart import TRAIN_SIZE, UNSEEN_SHIPS
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError

TASK = {"type": "generation", "prompt": "{a} =>", "label": "{b}"}


@pytest.fixture
def folder(tmp_path):
    for name, count in (("train", 5), ("validation", 3), ("test", 2), ("extra", 1)):
        rows = [{"a": f"{name} {i}", "b": "yes no"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def count(settings: DataSettings, split: str) -> int:
    tokenizer = build_tokenizer(training_texts(settings), {"type": "word"})
    return len(load_task_data(settings, tokenizer, split))


def test_a_directory_has_splits(folder):
    settings = DataSettings(data=str(folder), task=TASK)
    assert [count(settings, split) for split in ("train", "val", "test")] == [5, 3, 2]
    assert check_data(settings, ("train", "val", "test")) == find_task(settings)
    other = settings.model_copy(update={"val_data_split": "extra"})
    assert count(other, "val") == 1


def test_splits_may_be_in_a_folder_data(folder):
    settings = DataSettings(data=str(folder), task=TASK)
    (folder / "data").mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").rename(folder / "data" / f"{name}.jsonl")
    assert [count(settings, split) for split in ("train", "val", "test")] == [5, 3, 2]
    (folder / "data" / "train-0.jsonl").write_text('{"a": "a piece", "b": "no"}')
    assert count(settings, "train") == 5  # of one place and kind only
    (folder / "train-0.jsonl").write_text('{"a": "nearer", "b": "no"}')
    assert count(settings, "train") == 1


def test_files_are_named_one_by_one(folder):
    paths = {k: str(folder / f"{k}.jsonl") for k in ("train", "validation", "test")}
    settings = DataSettings(
        data=paths["train"], val_data=paths["validation"], test_data=paths["test"], task=TASK
    )
    assert [count(settings, split) for split in ("train", "val", "test")] == [5, 3, 2]


def test_evaluation_keeps_references_and_long_examples_and_training_drops_them(folder):
    settings = DataSettings(data=str(folder), task=TASK, max_length=5)
    tokenizer = build_tokenizer(training_texts(settings), {"type": "word"})
    with pytest.raises(InputError, match="all 5 examples are longer than 5"):
        load_task_data(settings, tokenizer, "train")
    val = load_task_data(settings, tokenizer, "val")
    assert len(val) == 3 and [val.references(i) for i in range(3)] == [("yes no",)] * 3
    assert val.task is not None and val.task.metrics[0] == "bleu"


def test_packing_drops_what_is_longer_than_a_row(folder):
    long = {"a": "x " * 40, "b": "y"}
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    settings = DataSettings(data=str(folder), task=TASK, packing=True, tokens_per_batch=16)
    tokenizer = build_tokenizer(training_texts(settings), {"type": "word"})
    data = load_task_data(settings, tokenizer, "train")
    assert (len(data), data.dropped) == (5, 1)


def test_quickstart_by_name_shares_its_vocabulary_with_the_base():
    base, task = DataSettings(data="quickstart_base_700"), DataSettings(data="quickstart")
    tokenizer = build_tokenizer(training_texts(base), {"type": "word"})
    assert 90 <= len(tokenizer) <= 130
    assert len(load_task_data(base, tokenizer, "train")) == 700
    splits = {s: load_task_data(task, tokenizer, s) for s in ("train", "val", "test")}
    assert len(splits["train"]) == TRAIN_SIZE
    assert all(tokenizer.unk_token_id not in data.chunks[0].ids for data in splits.values())
    assert splits["test"].task.metrics[0] == "exact_match"
    prompt = tokenizer.decode(splits["test"].prompt_ids(0))
    assert prompt.endswith("=>") and any(name in prompt for name in UNSEEN_SHIPS)
    answer = tokenizer.decode(splits["test"].label_ids(0)[:-1])
    assert (answer,) == splits["test"].references(0)
    limited = load_task_data(task, tokenizer, "train", limit=8)
    assert limited.example_ids(7).tolist() == splits["train"].example_ids(7).tolist()
    assert len(limited) == 8


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"data": "quickstrat"}, "train", "data: quickstrat is neither a file nor a data set name"),
        (
            {"data": "rte"},
            "train",
            "data: rte is neither a file nor a data set name; did you mean 'gl",
        ),
        ({"data": "glue_rte"}, "train", "did you mean 'glue-tvt_rte'"),
        ({"data": "Spider"}, "train", "did you mean 'spider-tvt'?"),
        ({"data": "no/where"}, "train", "data: no/where: the hub's no/where cannot be read"),
        ({"data": "no/where.jsonl"}, "train", "data: no/where.jsonl is neither a file"),
        ({"val_data": "no/val.jsonl"}, "val", "val_data: no/val.jsonl is neither a file"),
        ({"data": "{folder}/train.jsonl"}, "val", "has no 'val' split; set val_data"),
        ({"val_data_split": "dev2"}, "val", "has no 'dev2' file"),
        ({"data": "quickstart", "val_data_split": "dev2"}, "val", "quickstart has no split 'dev2'"),
        ({"task": None}, "train", "task is missing"),
        ({"task": "sst2"}, "train", "train.jsonl:1: no field 'label'"),
        ({"task": "sst"}, "train", "unknown name 'sst'; did you mean 'sst2'"),
    ],
)
def test_mistakes_are_found_without_a_tokenizer(folder, changes, split, message):
    values = {"data": "{folder}", "task": TASK} | changes
    values = {k: v.format(folder=folder) if k == "data" else v for k, v in values.items()}
    with pytest.raises(InputError) as caught:
        check_data(DataSettings(**values), (split,))
    assert message in str(caught.value)


def test_a_file_in_the_home_directory_is_no_validation_data_either(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    settings = DataSettings(data="~/train.jsonl", task=TASK)
    assert count(settings, "train") == 5
    with pytest.raises(InputError, match=r"data is the one file ~/train.jsonl, which has no 'val'"):
        check_data(settings)


def test_without_a_home_directory(monkeypatch):
    def nowhere(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", nowhere)
    with pytest.raises(InputError, match="data: ~/x needs a home directory, and there is none"):
        find_source(DataSettings(data="~/x"), "train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(InputError, match="cache_dir: ~/.cache needs a home directory"):
        default_cache_dir()


def test_hidden_files_and_folders_are_no_data(folder):
    for name in ("train", "val"):
        (folder / f"{name}-hidden").mkdir()
    split = folder / "pieces" / "train"
    split.mkdir(parents=True)
    (folder / "train.jsonl").rename(split / "1.jsonl")
    (split / "._1.jsonl").write_bytes(b"\x00\x05\x16\x07")  # what a Mac leaves beside a file
    (split / "2.jsonl").mkdir()
    settings = DataSettings(data=str(folder / "pieces"), task=TASK)
    assert count(settings, "train") == 5


def test_each_split_is_asked_as_its_own_data_set_asks(folder):
    """RTE's 0 is WNLI's 1: read as the other, its labels would be turned round."""
    values = {"data": "glue-tvt_rte", "val_data": "glue-tvt_wnli", "test_data": "glue-tvt_cola"}
    settings = DataSettings(**values, data_root=str(folder))
    rows = [{"sentence1": "a", "sentence2": "b", "sentence": "c", "label": 1, "idx": 0}] * 10
    for name in ("rte", "wnli", "cola"):
        (folder / "glue" / name).mkdir(parents=True)
        for split in ("train", "validation"):
            path = folder / "glue" / name / f"{split}-00000-of-00001.parquet"
            parquet.write_table(pa.Table.from_pylist(rows), path)
    names = zip(SPLITS, values.values(), strict=True)
    tasks = {split: PUBLISHED[name].task for split, name in names}
    assert [find_task(settings, split) for split in SPLITS] == list(tasks.values())
    assert check_data(settings, tuple(SPLITS)) == tasks["val"]
    tokenizer = build_tokenizer(["a b c 0 1"], {"type": "word"})
    for split, task in tasks.items():
        assert load_task_data(settings, tokenizer, split).task == task
    one = settings.model_copy(update={"task": tasks["train"].model_dump()})
    assert find_task(one, "val") == find_task(one, "train") == tasks["train"]
    files = settings.model_copy(update={"val_data": str(folder), "test_data": None})
    assert find_task(files, "val") == tasks["train"]


def test_a_look_at_the_first_record_does_not_read_them_all(folder, monkeypatch):
    (folder / "glue" / "rte").mkdir(parents=True)
    header = "index\tsentence1\tsentence2\tlabel"
    for name in ("train.tsv", "dev.tsv"):
        lines = [header, "0\ta\tb\tentailment", "broken"]
        (folder / "glue" / "rte" / name).write_text("\n".join(lines))
    settings = DataSettings(data="glue-tvt_rte", data_root=str(folder))
    assert check_data(settings, ("train", "val", "test")).type == "classification"
    with pytest.raises(InputError, match=r"train.tsv:3: 1 values; expected 4"):
        list(find_source(settings, "train").open().rows)


def test_test_data_is_named_or_brought_along(folder):
    file = DataSettings(data=str(folder / "train.jsonl"), task=TASK)
    assert why_no_test(file).endswith("train.jsonl, which has no 'test' split; set test_data")
    assert why_no_test(DataSettings(data=str(folder), task=TASK)) is None
    assert why_no_test(DataSettings(data="quickstart")) is None
    misspelt = file.model_copy(update={"test_data": "no/test.jsonl"})
    assert why_no_test(misspelt) is None
    with pytest.raises(InputError, match="test_data: no/test.jsonl is neither"):
        check_data(misspelt, ("test",))


def test_an_empty_file(folder):
    (folder / "train.jsonl").write_text("\n")
    settings = DataSettings(data=str(folder), task=TASK)
    with pytest.raises(InputError, match=r"train.jsonl holds no records"):
        check_data(settings)


def test_records_can_be_listed():
    records = find_source(DataSettings(data="quickstart"), "val").open()
    assert records.where(3) == "quickstart (val), record 3"


def test_random_data_has_the_length_of_its_name():
    tokenizer = build_tokenizer(["a b c d e f"], {"type": "word"})
    settings = DataSettings(data="random_12")
    assert check_data(settings).type == "text" and why_no_test(settings)
    data = load_task_data(settings, tokenizer, "train")
    assert set(data.lengths.tolist()) == {12} and len(data) == 1024
    assert data.learnt(3).tolist() == [False] * 11 + [True]
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert not special & set(data.chunks[0].ids.tolist())
    few = load_task_data(settings, tokenizer, "train", limit=8)
    assert len(few) == 8 and few.example_ids(7).tolist() == data.example_ids(7).tolist()
    with pytest.raises(InputError, match="random_12 has ids but no texts; set `tokenizer:`"):
        next(training_texts(settings))
    with pytest.raises(InputError, match="random_1: an example has at least 2 tokens"):
        check_data(DataSettings(data="random_1"))


def test_a_hub_data_set_is_read_from_the_cache_like_a_directory(folder, monkeypatch):
    asked = {}

    def download(repository, patterns, name):
        asked["patterns"] = patterns
        return folder

    monkeypatch.setattr("ssm_train.data.sources.download", download)
    (folder / "data").mkdir()
    for number in range(2):
        row = {"prompt": f"{number}", "completion": " x"}
        (folder / "data" / f"train-0000{number}-of-00002.jsonl").write_text(json.dumps(row))
    (folder / "train.jsonl").unlink()
    records = find_source(DataSettings(data="owner/name"), "train").open()
    assert [record["prompt"] for _, record in records.rows] == ["0", "1"]
    assert "data/train-*.parquet" in asked["patterns"] and "train.jsonl" in asked["patterns"]


def test_the_hub_out_of_reach_is_one_line():
    with pytest.raises(InputError) as caught:
        check_data(DataSettings(data="nobody/nothing", task=TASK))
    assert str(caught.value).startswith("data: nobody/nothing: the hub's nobody/nothing cannot be")
    assert "\n" not in str(caught.value)


def test_bad_records_of_several_files_are_named_by_their_own(tmp_path):
    good, bad = {"a": "x", "b": "y"}, {"a": "x"}
    for number, rows in enumerate([[good] * 2, [], [good, bad], [good]]):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"train-{number}.jsonl").write_text(lines)
    settings = DataSettings(data=str(tmp_path), task=TASK)
    records = find_source(settings, "train").open()
    numbers = [number for number, _ in records.rows]  # all are read before some are drawn
    places = [records.where(number).rpartition("/")[2] for number in numbers]
    names = ("train-0", "train-0", "train-2", "train-2", "train-3")
    assert places == [f"{name}.jsonl:{n}" for name, n in zip(names, (1, 2, 1, 2, 1), strict=True)]
    tokenizer = build_tokenizer(["x y =>"], {"type": "word"})
    with pytest.raises(InputError, match=r"train-2.jsonl:2: no field 'b'"):
        load_task_data(settings, tokenizer, "train")
