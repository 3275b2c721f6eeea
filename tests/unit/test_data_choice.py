"""BoolQ, PIQA, ARC and MMLU in the layouts of the hub and of their releases."""

import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ssm_train.data.published import find_split
from ssm_train.data.tasks.choice import DATASETS
from ssm_train.data.tasks.task import Rendered
from ssm_train.errors import InputError


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def examples(name: str, split: str, root: Path) -> list[Rendered]:
    found = find_split(DATASETS[name], name, split, str(root), None)
    return [
        example
        for _, record in found.open().rows
        for example in found.published.task.render(record, training=split == "train")
    ]


def ask(name: str, split: str, root: Path) -> list[tuple[str, str]]:
    """(input, label) of each example; the parts around the input are the same for all."""
    found = examples(name, split, root)
    assert len({(e.segments[0], e.segments[2]) for e in found}) == 1
    assert not found[0].segments[2].text.endswith(" ")
    return [(e.segments[1].text, e.label) for e in found]


def test_every_task_is_scored_by_accuracy_over_words_with_a_space():
    for published in DATASETS.values():
        assert published.task.metrics == ["accuracy"]
        assert all(re.fullmatch(" (yes|no|[A-E])", word) for word in published.task.words)


# ---------------------------------------------------------------- BoolQ


def test_boolq_in_each_layout(tmp_path):
    texts = [{"question": f"is {i} odd", "passage": f"Passage {i}."} for i in range(2)]
    for split in ("train", "validation"):
        rows = [row | {"answer": bool(i)} for i, row in enumerate(texts)]
        write_parquet(tmp_path / "hub/google/boolq/data" / f"{split}-00000-of-00001.parquet", rows)
        glue = [row | {"label": i, "idx": i} for i, row in enumerate(texts)]
        write_parquet(tmp_path / "superglue/boolq" / f"{split}-00000-of-00001.parquet", glue)
    titled = [row | {"title": "t", "answer": bool(i)} for i, row in enumerate(texts)]
    written = [row | {"label": bool(i), "idx": i} for i, row in enumerate(texts)]
    for name in ("train", "dev"):
        write_jsonl(tmp_path / "google" / "boolq" / f"{name}.jsonl", titled)
    for name in ("train", "val"):
        write_jsonl(tmp_path / "release" / "BoolQ" / f"{name}.jsonl", written)
    expected = [(f"Passage {i}.\nQuestion: is {i} odd?\n", (" no", " yes")[i]) for i in range(2)]
    for layout in ("hub", "superglue", "google", "release"):
        root = tmp_path if layout == "google" else tmp_path / layout
        assert ask("boolq", "train", root) == ask("boolq", "val", root) == expected
    with pytest.raises(InputError, match="boolq has no split 'test'; it has train, val"):
        examples("boolq", "test", tmp_path)


@pytest.mark.parametrize("label", [-1, None, "maybe", 2])
def test_a_question_of_boolq_without_answer(label, tmp_path):
    write_jsonl(tmp_path / "boolq/train.jsonl", [{"question": "a", "passage": "b", "label": label}])
    with pytest.raises(InputError, match=re.escape(f"train.jsonl:1: label {label!r}; known: 0, 1")):
        examples("boolq", "train", tmp_path)


# ---------------------------------------------------------------- PIQA

GOALS = [{"goal": f"Open jar {i}.", "sol1": "Twist.", "sol2": "Sing."} for i in range(3)]


def test_piqa_in_each_layout(tmp_path):
    for name in ("train", "valid"):
        write_jsonl(tmp_path / "release" / "piqa" / f"{name}.jsonl", GOALS)
        (tmp_path / "release" / "piqa" / f"{name}-labels.lst").write_text("0\n1\n0\n")
    rows = [row | {"label": i % 2} for i, row in enumerate(GOALS)]
    for split in ("train", "validation"):
        write_parquet(tmp_path / "hub" / "baber" / "piqa" / f"piqa_{split}.parquet", rows)
        write_parquet(
            tmp_path / "other" / "piqa" / "data" / f"{split}-00000-of-00001.parquet", rows
        )
    expected = [
        (f"Goal: Open jar {i}.\nA. Twist.\nB. Sing.\n", (" A", " B", " A")[i]) for i in range(3)
    ]
    for layout in ("release", "hub", "other"):
        for split in ("train", "val"):
            assert ask("piqa", split, tmp_path / layout) == expected


def test_labels_of_piqa_that_do_not_fit(tmp_path):
    labels = tmp_path / "piqa" / "train-labels.lst"
    write_jsonl(tmp_path / "piqa" / "train.jsonl", GOALS)
    for text, message in (
        (None, "train.jsonl has no labels; put train-labels.lst next to it"),
        ("0\n1\n", "train-labels.lst has 2 labels for 3 in "),
        ("0\n1\n2\n", "train.jsonl:3: label '2'; known: 0, 1"),
    ):
        if text is not None:
            labels.write_text(text)
        with pytest.raises(InputError, match=re.escape(message)):
            examples("piqa", "train", tmp_path)


# ---------------------------------------------------------------- ARC


def hub_question(names: str, key: str) -> dict:
    texts = [f"Answer {place}" for place in range(1, len(names) + 1)]
    return {
        "id": "Mercury_1",
        "question": "Why?",
        "choices": {"text": texts, "label": list(names)},
        "answerKey": key,
    }


def official_question(hub: dict) -> dict:
    pairs = zip(hub["choices"]["text"], hub["choices"]["label"], strict=True)
    choices = [{"text": text, "label": label} for text, label in pairs]
    question = {"stem": hub["question"], "choices": choices}
    return {"id": hub["id"], "question": question, "answerKey": hub["answerKey"]}


@pytest.mark.parametrize(
    ("name", "config"),
    [("arc", "ARC-Challenge"), ("arc-challenge", "ARC-Challenge"), ("arc-easy", "ARC-Easy")],
)
def test_arc_in_each_layout(name, config, tmp_path):
    rows = [
        hub_question("ABCD", "C"),
        hub_question("1234", "1"),
        hub_question("ABC", "B"),
        hub_question("12345", "5"),
    ]
    official = tmp_path / "release" / "ARC-V1-Feb2018-2" / config
    for hub, split in (("train", "Train"), ("validation", "Dev"), ("test", "Test")):
        folder = tmp_path / "hub" / "allenai" / "ai2_arc" / config
        write_parquet(folder / f"{hub}-00000-of-00001.parquet", rows)
        write_jsonl(official / f"{config}-{split}.jsonl", [official_question(row) for row in rows])
    lines = [f"{letter}. Answer {n}\n" for n, letter in enumerate("ABCDE", start=1)]
    expected = [
        ("Question: Why?\n" + "".join(lines[:count]), label)
        for count, label in ((4, " C"), (4, " A"), (3, " B"), (5, " E"))
    ]
    for split in ("train", "val", "test"):
        assert ask(name, split, tmp_path / "hub") == expected
        assert ask(name, split, tmp_path / "release") == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (hub_question("ABCD", "E"), "Train.jsonl:1: answerKey 'E'; known: A, B, C, D"),
        (hub_question("ABCD", ""), "Train.jsonl:1: answerKey ''"),
        (hub_question("123456", "6"), "Train.jsonl:1: 6 choices; expected 2 to 5"),
        ({"question": {"stem": "Why?"}, "answerKey": "A"}, "Train.jsonl:1: no field 'choices'"),
    ],
)
def test_bad_questions_of_arc(row, message, tmp_path):
    write_jsonl(tmp_path / "arc" / "ARC-Easy" / "ARC-Easy-Train.jsonl", [row])
    with pytest.raises(InputError, match=re.escape(message)):
        examples("arc-easy", "train", tmp_path)


# ---------------------------------------------------------------- MMLU

QUESTIONS = [['Who said "a, b"?\nAnd why?', "I", "You", "0.5", "", "D"], ["2 + 2", *"4567", "A"]]


def test_mmlu_in_each_layout(tmp_path):
    rows = [
        {"question": q, "subject": "", "choices": choices, "answer": "ABCD".index(answer)}
        for q, *choices, answer in QUESTIONS
    ]
    for hub in ("auxiliary_train", "validation", "test"):
        path = tmp_path / "hub" / "cais" / "mmlu" / "all" / f"{hub}-00000-of-00001.parquet"
        write_parquet(path, rows)
    data = tmp_path / "release" / "mmlu" / "data"
    write_csv(data / "auxiliary_train" / "race.csv", QUESTIONS)
    for split in ("dev", "val", "test"):
        write_csv(data / split / f"anatomy_{split}.csv", QUESTIONS[:1])
        write_csv(data / split / f"virology_{split}.csv", QUESTIONS[1:])
    expected = [
        ('Question: Who said "a, b"?\nAnd why?\nA. I\nB. You\nC. 0.5\nD. \n', " D"),
        ("Question: 2 + 2\nA. 4\nB. 5\nC. 6\nD. 7\n", " A"),
    ]
    for split in ("train", "val", "test"):
        assert ask("mmlu", split, tmp_path / "hub") == expected
        assert ask("mmlu", split, tmp_path / "release") == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["Why?", *"abc", "A"], "virology_val.csv:3: 5 values; expected 6, from 'question' to"),
        (["Why?", *"abcd", "E"], "virology_val.csv:3: answer 'E'; known: A, B, C, D, or a place"),
        (["Why?", *"abcd", ""], "virology_val.csv:3: answer ''"),
    ],
)
def test_a_bad_line_of_mmlu_is_named_by_its_own_file(row, message, tmp_path):
    for subject, rows in (("anatomy", QUESTIONS), ("virology", [QUESTIONS[0], row])):
        write_csv(tmp_path / "MMLU" / "val" / f"{subject}_val.csv", rows)
    with pytest.raises(InputError, match=re.escape(message)):
        examples("mmlu", "val", tmp_path)
