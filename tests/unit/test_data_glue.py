"""GLUE in the layouts of its files: the hub's Parquet and the official TSV give the same splits."""

import csv
import re
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from ssm_train.data.published import FoundSplit, find_split
from ssm_train.data.tasks.glue import DATASETS, TASKS
from ssm_train.errors import InputError

HEADERS = {
    "cola": "",
    "sst2": "sentence label",
    "mrpc": "Quality,#1 ID,#2 ID,#1 String,#2 String",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "qnli": "index question sentence label",
    "rte": "index sentence1 sentence2 label",
    "wnli": "index sentence1 sentence2 label",
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
    "sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label",
}
WORDS = {
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "mnli": ["entailment", "neutral", "contradiction"],
}
"""Labels of the official files that are no digits."""


def hub_rows(name: str, count: int, start: int = 0) -> list[dict]:
    """Records of the hub's copy: texts, label, idx."""
    classes = 3 if name == "mnli" else 2
    return [
        {field: f"{field} {i} says \"so , '" for field in TASKS[name].fields}
        | {"label": i % classes, "idx": i}
        for i in range(start, start + count)
    ]


def write_hub(folder: Path, **splits: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        table = pa.Table.from_pylist(rows)
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def official_lines(name: str, rows: list[dict]) -> list[str]:
    """The header, where there is one, and a line a record."""
    lines = []
    for row in rows:
        first, second = [row[field] for field in (*TASKS[name].fields, TASKS[name].fields[0])][:2]
        label = WORDS[name][row["label"]] if name in WORDS else str(row["label"])
        i = row["idx"]
        lines.append(
            {
                "cola": ["gj04", label, "" if row["label"] else "*", first],
                "sst2": [first, label],
                "mrpc": [label, f"{i}1", f"{i}2", first, second],
                "qqp": [str(i), "1", "2", first, second, label],
                "mnli": [str(i), "p", "q", "fiction", *"()()", first, second, "neutral", label],
            }.get(name, [str(i), first, second, label])
        )
    header = re.split("[ ,]" if name != "mrpc" else ",", HEADERS[name])
    return ["\t".join(values) for values in ([header] if HEADERS[name] else []) + lines]


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def split_of(name: str, split: str, root: Path) -> FoundSplit:
    return find_split(DATASETS[f"glue-tvt_{name}"], f"glue-tvt_{name}", split, str(root), None)


def records(name: str, split: str, root: Path) -> list[dict]:
    return [record for _, record in split_of(name, split, root).open().rows]


def without_idx(rows: list[dict]) -> list[dict]:
    return [{field: value for field, value in row.items() if field != "idx"} for row in rows]


def write_both(name: str, root: Path) -> tuple[list[dict], list[dict]]:
    """The same records below root/hub and root/official; returns train and validation."""
    train, validation = hub_rows(name, 23), hub_rows(name, 7, start=100)
    official = root / "official" / "glue_data" / TASKS[name].folder
    write_lines(official / "train.tsv", official_lines(name, train))
    if name == "mnli":
        halves = {"matched": validation[:4], "mismatched": validation[4:]}
    else:
        halves = {"": validation}
    for half, rows in halves.items():
        suffix = f"_{half}" if half else ""
        write_lines(official / f"dev{suffix}.tsv", official_lines(name, rows))
        write_hub(root / "hub" / "glue" / name, train=train, **{f"validation{suffix}": rows})
    return train, validation


@pytest.mark.parametrize("name", TASKS)
def test_both_layouts_hold_the_same_records_and_the_same_splits(name, tmp_path):
    train, validation = write_both(name, tmp_path)
    expected = Dataset.from_list(train).train_test_split(test_size=0.2, seed=123)
    for layout in ("hub", "official"):
        root = tmp_path / layout
        assert records(name, "train", root) == without_idx(expected["train"].to_list())
        assert records(name, "val", root) == without_idx(expected["test"].to_list())
        assert records(name, "test", root) == without_idx(validation)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_hold_the_texts_and_labels_are_the_hubs_digits(name):
    published, (record, other) = DATASETS[f"glue-tvt_{name}"], hub_rows(name, 2)
    (example,) = published.task.render(record, training=True)
    instruction, texts, cue, label = [segment.text for segment in example.segments]
    for field in TASKS[name].fields:
        assert record[field] in texts and record[field] not in instruction + cue
    assert not cue.endswith(" ") and label == " 0" and not example.ends
    assert published.task.render(other, training=False)[0].references == (" 1",)
    assert len(published.task.words) == (3 if name == "mnli" else 2)


def test_the_metrics_of_each_task():
    special = {"cola": ["mcc"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]}
    for name in TASKS:
        assert DATASETS[f"glue-tvt_{name}"].task.metrics == special.get(name, ["accuracy"])


def test_quotes_are_ordinary_characters_as_in_csvs_quote_none(tmp_path):
    path = tmp_path / "GLUE" / "QNLI" / "dev.tsv"
    lines = ["index\tquestion\tsentence\tlabel"]
    lines += ['0\t"Who\tHe said "no".\tentailment', '1\tWhat"s ""that"" \tA, b\tnot_entailment']
    write_lines(path, lines)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    found = records("qnli", "test", tmp_path)
    assert [(r["question"], r["sentence"]) for r in found] == [
        (r["question"], r["sentence"]) for r in rows
    ]
    assert [r["label"] for r in found] == [0, 1]


def test_windows_line_ends_and_a_byte_order_mark_are_not_text(tmp_path):
    path = tmp_path / "glue" / "SST-2" / "dev.tsv"
    path.parent.mkdir(parents=True)
    path.write_bytes("\ufeffsentence\tlabel\r\nfine \t1\r\n".encode())
    assert records("sst2", "test", tmp_path) == [{"sentence": "fine ", "label": 1}]


def test_broken_lines_of_qqp_are_no_records(tmp_path):
    lines = official_lines("qqp", hub_rows("qqp", 3))
    lines[2:2] = ["7\t1\t2\tHow do I", "go on?\tWhy?\t1"]
    write_lines(tmp_path / "glue" / "QQP" / "dev.tsv", lines)
    assert records("qqp", "test", tmp_path) == without_idx(hub_rows("qqp", 3))


def test_mnli_is_tested_on_matched_then_mismatched_and_names_the_file_of_a_mistake(tmp_path):
    folder = tmp_path / "glue" / "MNLI"
    for half, label in (("matched", "neutral"), ("mismatched", "maybe")):
        lines = official_lines("mnli", hub_rows("mnli", 2))
        write_lines(
            folder / f"dev_{half}.tsv", [*lines, lines[-1].rpartition("\t")[0] + f"\t{label}"]
        )
    with pytest.raises(InputError, match=r"dev_mismatched.tsv:4: label 'maybe'; known: entailment"):
        records("mnli", "test", tmp_path)
    (folder / "dev_matched.tsv").unlink()
    with pytest.raises(InputError, match=r"has dev_mismatched.tsv but not the other half"):
        records("mnli", "test", tmp_path)


def test_microsofts_release_of_mrpc_is_split_by_glues_list(tmp_path):
    rows, folder = hub_rows("mrpc", 12), tmp_path / "glue_data" / "MRPC"
    write_lines(folder / "msr_paraphrase_train.txt", official_lines("mrpc", rows))
    with pytest.raises(InputError, match=r"msr_paraphrase_train.txt holds .* put GLUE's dev_ids"):
        records("mrpc", "train", tmp_path)
    write_lines(folder / "mrpc_dev_ids.tsv", ["31\t32", "51\t52"])
    assert records("mrpc", "test", tmp_path) == without_idx([rows[3], rows[5]])
    kept = [row for row in rows if row["idx"] not in (3, 5)]
    expected = Dataset.from_list(kept).train_test_split(test_size=0.2, seed=123)
    assert records("mrpc", "train", tmp_path) == without_idx(expected["train"].to_list())
    write_lines(folder / "mrpc_dev_ids.tsv", ["31\t32", "77\t78"])
    with pytest.raises(
        InputError, match=r"mrpc_dev_ids.tsv names the pair 77 78, which .*train.txt"
    ):
        records("mrpc", "test", tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["index\tsentence1\tsentence2\tlabel", "0\ta\tb"], "dev.tsv:2: 3 values; expected 4"),
        (
            ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tc\t1"],
            "dev.tsv:2: 5 values; expected 4",
        ),
        (["index\tsentence1\tlabel"], "dev.tsv:1: no column 'sentence2'; it has index, sentence1"),
        (
            ["sentence1\tsentence2\tlabel", "a\tb\t2"],
            "dev.tsv:2: label '2'; known: entailment, not_",
        ),
        ([], "dev.tsv:1: no column 'sentence1'"),
    ],
)
def test_bad_lines(lines, message, tmp_path):
    write_lines(tmp_path / "glue" / "RTE" / "dev.tsv", lines)
    with pytest.raises(InputError) as caught:
        records("rte", "test", tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_in_another_encoding(tmp_path):
    write_lines(tmp_path / "glue" / "RTE" / "dev.tsv", [])
    (tmp_path / "glue" / "RTE" / "dev.tsv").write_bytes(b"index\tcaf\xe9")
    with pytest.raises(InputError, match=r"dev.tsv is not UTF-8 text"):
        records("rte", "test", tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"label": -1},
            "parquet, record 1: label -1; known: entailment, not_entailment, 0, 1 (-1:",
        ),
        ({"label": 2}, "record 1: label 2; known"),
        ({"sentence1": None}, "field 'sentence1' is or holds null"),
        ({"sentence2": ...}, "record 1: no field 'sentence2'; it has 'sentence1', 'label'"),
    ],
)
def test_bad_records(row, message, tmp_path):
    """`...`: without that field."""
    row = {"sentence1": "a", "sentence2": "b", "label": 0} | row
    row = {field: value for field, value in row.items() if value is not ...}
    write_hub(tmp_path / "nyu-mll" / "glue" / "rte", validation=[row])
    found = split_of("rte", "test", tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        [found.published.task.render(record, training=False) for _, record in found.open().rows]


def test_a_cached_copy_of_the_hub_is_read_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "datasets--nyu-mll--glue", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    rows = hub_rows("rte", 5)
    write_hub(repository / "snapshots" / commit / "rte", train=rows, validation=rows)
    found = find_split(DATASETS["glue-tvt_rte"], "glue-tvt_rte", "test", None, None)
    assert [record for _, record in found.open().rows] == without_idx(rows)
