"""DART, SAMSum and Alpaca in the layouts of the hub and of their releases."""

import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from ssm_train.data.published import find_split
from ssm_train.data.tasks import alpaca, dart, samsum
from ssm_train.errors import InputError

DATASETS = dart.DATASETS | samsum.DATASETS | alpaca.DATASETS


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def write_json(path: Path, rows: list[dict]) -> None:
    """A list (.json), or an object a line (.jsonl)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text)


def records(name: str, split: str, root: Path | None) -> list[dict]:
    data_root = None if root is None else str(root)
    found = find_split(DATASETS[name], name, split, data_root, None)
    return [record for _, record in found.open().rows]


def examples(name: str, split: str, root: Path) -> list:
    task, training = DATASETS[name].task, split == "train"
    return [
        example
        for record in records(name, split, root)
        for example in task.render(record, training=training)
    ]


# ---------------------------------------------------------------- DART

TRIPLES = [["Mars", "MOON", "Phobos"], ["Mars", "COLOUR", "red"]]
TEXTS = ["Mars is red and has a moon, Phobos.", "Phobos is a moon of Mars."]
SOURCES = ["WebNLG", "e2e"]
DART_FORMS = {
    "dart/dart-v1.1.1-full-{dev}.json": [
        {"source": source, "text": text} for source, text in zip(SOURCES, TEXTS, strict=True)
    ],
    "dart/data/v1.1.1/dart-v1.1.1-full-{dev}.json": [{"text": text} for text in TEXTS],
    "dart/default/{validation}/0000.parquet": {"source": SOURCES, "text": TEXTS},
    "GEM/dart/data/{validation}-00000-of-00001.parquet": {"source": SOURCES, "text": TEXTS},
    "dart/{validation}.jsonl": TEXTS,
}
"""File -> how its records say their annotations."""


@pytest.mark.parametrize("place", DART_FORMS)
def test_dart_in_each_layout(place, tmp_path):
    row = {"tripleset": TRIPLES, "subtree_was_extended": False, "annotations": DART_FORMS[place]}
    write = write_parquet if place.endswith("parquet") else write_json
    for hub, official in (("train", "train"), ("validation", "dev"), ("test", "test")):
        write(tmp_path / place.format(dev=official, validation=hub), [row] * (2 + len(hub)))
    for split, count in (("train", 7), ("val", 12), ("test", 6)):
        assert len(records("dart", split, tmp_path)) == count
        found = examples("dart", split, tmp_path)
        assert len(found) == (2 * count if split == "train" else count), "every reference is learnt"
        assert found[0].prompt == (
            "facts : Mars : MOON : Phobos | Mars : COLOUR : red \ndescription :"
        )
        assert found[0].references == tuple(TEXTS) and found[0].label == f" {TEXTS[0]}"
    assert dart.DART.metrics == ["bleu", "meteor", "rougeL"]


def test_dart_leaves_out_annotations_without_text(tmp_path):
    rows = [
        {"tripleset": TRIPLES, "annotations": [{"source": "x", "text": text} for text in texts]}
        for texts in (["", "Mars."], ["  "], [], ["Red."])
    ]
    write_json(tmp_path / "dart" / "dart-v1.1.1-full-train.json", rows)
    assert [r["annotations"] for r in records("dart", "train", tmp_path)] == [["Mars."], ["Red."]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tripleset": TRIPLES}, "train.jsonl:2: no field 'annotations'; it has 'tripleset'"),
        ({"tripleset": TRIPLES, "annotations": None}, "train.jsonl:2: field 'annotations' is neit"),
        (
            {"tripleset": TRIPLES, "annotations": {"texts": []}},
            "train.jsonl:2: field 'annotations'",
        ),
        ({"tripleset": TRIPLES, "annotations": [{"source": "x"}]}, "an annotation without text"),
        ({"tripleset": [], "annotations": "x"}, "field 'tripleset' is or holds a list"),
        ({"annotations": ["x"]}, "train.jsonl:2: no field 'tripleset'"),
    ],
)
def test_bad_dart_records(row, message, tmp_path):
    write_json(tmp_path / "dart" / "train.jsonl", [{"tripleset": TRIPLES, "annotations": "x"}, row])
    with pytest.raises(InputError, match=re.escape(message)):
        examples("dart", "train", tmp_path)


def test_dart_of_the_hub_is_on_the_branch_of_parquet_files(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "datasets--Yale-LILY--dart", "0" * 40
    reference = repository / "refs" / "refs" / "convert" / "parquet"
    reference.parent.mkdir(parents=True)
    reference.write_text(commit)
    row = {"tripleset": TRIPLES, "annotations": {"source": SOURCES, "text": TEXTS}}
    write_parquet(repository / "snapshots" / commit / "default" / "train" / "0000.parquet", [row])
    assert records("dart", "train", None) == [{"tripleset": TRIPLES, "annotations": TEXTS}]
    reference.unlink()
    with pytest.raises(InputError, match="dart: the hub's Yale-LILY/dart cannot be read"):
        records("dart", "train", None)


# ---------------------------------------------------------------- SAMSum

CHATS = [
    {"id": "1", "dialogue": 'Amy: "hi", Bo\r\nBo: hello', "summary": "Amy greets Bo."},
    {"id": "2", "dialogue": "", "summary": "Nothing was said."},
    {"id": "3", "dialogue": "Cy: bye", "summary": "Cy leaves."},
]


def test_samsum_in_each_layout(tmp_path):
    names = (("train", "train"), ("validation", "val"), ("test", "test"))
    for hub, official in names:
        write_json(tmp_path / "json" / "samsum" / f"{official}.json", CHATS)
        write_parquet(tmp_path / "hub" / "samsum" / "data" / f"{hub}-00000-of-00001.parquet", CHATS)
        table = tmp_path / "csv" / "knkarthick" / "samsum" / f"{hub}.csv"
        table.parent.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "dialogue", "summary"])
            writer.writeheader()
            writer.writerows(CHATS)
    for layout in ("json", "hub", "csv"):
        for split in ("train", "val", "test"):
            first, second = examples("samsum", split, tmp_path / layout)
            assert [s.text for s in first.segments[1:]] == [
                'Amy: "hi", Bo\nBo: hello',
                "\n\nSummary:",
                " Amy greets Bo.",
            ]
            assert second.references == ("Cy leaves.",)
    assert samsum.SAMSUM.metrics == ["rougeL", "rouge1", "rouge2"]


def test_a_chat_without_summary_is_a_mistake(tmp_path):
    write_json(tmp_path / "samsum" / "train.json", [CHATS[0] | {"summary": ""}])
    with pytest.raises(InputError, match="is empty"):
        examples("samsum", "train", tmp_path)
    write_json(tmp_path / "samsum" / "train.json", [CHATS[0], {"dialogue": "x"}])
    with pytest.raises(InputError, match=r"train.json, record 2: no field 'summary'"):
        examples("samsum", "train", tmp_path)


# ---------------------------------------------------------------- Alpaca


def test_alpaca_in_each_layout_and_its_split(tmp_path):
    rows = [
        {"instruction": f"Count to {i}.", "input": "fast" if i % 2 else "", "output": f"{i}!"}
        for i in range(26)
    ]
    write_json(tmp_path / "json" / "alpaca" / "alpaca_data.json", rows)
    table = "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"
    hub = [row | {"text": "all of it"} for row in rows]
    write_parquet(tmp_path / "hub" / "tatsu-lab" / "alpaca" / table, hub)
    expected = Dataset.from_list(rows).train_test_split(test_size=0.2, seed=123)
    for layout in ("json", "hub"):
        for split, official in (("train", "train"), ("val", "test")):
            found = examples("alpaca", split, tmp_path / layout)
            assert [e.references for e in found] == [(o,) for o in expected[official]["output"]]
    with pytest.raises(InputError, match="alpaca has no split 'test'; it has train, val"):
        records("alpaca", "test", tmp_path / "json")


def test_alpaca_asks_with_and_without_input_and_drops_empty_answers():
    rows = [
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
        {"instruction": "Say {hi}.", "input": "", "output": "hi"},
        {"instruction": "Be silent.", "input": "", "output": " \n"},
        {"instruction": "Be silent.", "input": None, "output": None},
    ]
    shown = [
        DATASETS["alpaca"].task.render(record, training=True)[0]
        for record in map(alpaca.clean, rows)
        if record is not None
    ]
    texts = [[part.text for part in example.segments if part.text] for example in shown]
    assert [t[1:] for t in texts] == [
        ["Request: Translate.", "\n\nInput: chat", "\n\nAnswer:", " cat"],
        ["Request: Say {hi}.", "\n\nAnswer:", " hi"],
    ]
    assert texts[0][0] == texts[1][0]
