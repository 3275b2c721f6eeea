"""Data files: whatever they hold, it is examples or an InputError that names a place."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from made_inputs import (
    as_json,
    attempt,
    damaged,
    examples,
    misspelt,
    scalars,
    temporary_directory,
    texts,
    values,
)

from ssm_train.data import DataSettings
from ssm_train.data.sources import check_data, load_task_data, training_texts
from ssm_train.data.vocabulary import build_tokenizer

DIRECTORY = temporary_directory()
TOKENIZER = build_tokenizer(["a b c d => user assistant system"], {"type": "word"})
FIELDS = ["question", "answer", "label", "text", "messages", "prompt", "completion", "instruction",
          "input", "output", "conversations", "sentence"]  # fmt: skip
good_turns = st.sampled_from(
    [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": ""},
        {"role": "system", "content": "d"},
    ]
)
messages = st.lists(
    st.one_of(
        good_turns,
        good_turns,
        good_turns,
        st.fixed_dictionaries(
            {
                "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), values),
                "content": st.one_of(st.just("a b"), values),
            }
        ),
        st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": texts}),
        values,
    ),
    max_size=4,
)
records = st.one_of(
    st.dictionaries(
        misspelt(FIELDS), st.one_of(texts, texts, st.just("a b"), messages, values), max_size=5
    ),
    st.fixed_dictionaries({"question": st.one_of(st.just("a"), values), "answer": st.just("b")}),
    st.fixed_dictionaries({"question": st.just("a"), "answer": values, "label": scalars}),
    st.fixed_dictionaries({"messages": messages}),
    st.fixed_dictionaries({"messages": messages}),
    st.fixed_dictionaries({"prompt": messages, "completion": messages}),
    values,
)
TASKS: list[Any] = [
    None,
    {"type": "generation", "prompt": "{question} =>", "label": "{answer}"},
    {"type": "generation", "prompt": ["{question}", " => {text}"], "label": "{answer}"},
    {"type": "classification", "prompt": "{question}", "label_field": "label",
     "labels": {"a": "a", 1: "b", False: "c"}},
    {"type": "chat", "template": "plain"},
    {"type": "chat", "template": "{{ messages[0]['content'] }}{{ raise_exception('no') }}"},
    {"type": "chat", "template": "{{ messages[0].nothing.more }}"},
    {"type": "chat", "template": "{{ messages[0]['role'] + 1 }}"},
    {"type": "text"},
    "sst2", "dart",
]  # fmt: skip


def read(path: Path, content: bytes, task: Any) -> None:
    """What training and evaluation make of the file."""
    path.write_bytes(content)
    settings = attempt(
        lambda: DataSettings(
            data=str(path),
            val_data=str(path),
            task=task,
            cache_dir=str(DIRECTORY / "cache"),
            max_length=20,
            num_data_workers=0,
        )
    )
    assert settings is not None
    attempt(lambda: check_data(settings))
    attempt(lambda: list(training_texts(settings)))
    for split in ("train", "val"):
        dataset = attempt(lambda split=split: load_task_data(settings, TOKENIZER, split))
        if dataset is not None:
            assert len(dataset) and min(dataset.lengths) >= 2


tasks = st.sampled_from(range(len(TASKS))).map(TASKS.__getitem__)


lines = st.lists(records.map(as_json), min_size=1, max_size=3).map("\n".join)


@examples(400)
@given(lines, tasks)
def test_jsonl(content: str, task: Any) -> None:
    read(DIRECTORY / "data.jsonl", content.encode(), task)


@examples(100)
@given(damaged(lines), tasks)
def test_damaged_jsonl(content: bytes, task: Any) -> None:
    read(DIRECTORY / "data.jsonl", content, task)


@examples(100)
@given(damaged(st.lists(records, max_size=4).map(as_json)), tasks)
def test_json(content: bytes, task: Any) -> None:
    read(DIRECTORY / "data.json", content, task)


def table(rows: list[list[Any]], delimiter: str) -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, escapechar="\\").writerows(rows)
    return file.getvalue()


@examples(100)
@given(
    damaged(
        st.lists(st.lists(scalars, max_size=3), max_size=3).map(
            lambda rows: table([["question", "answer"], *rows], ",")
        )
    ),
    st.sampled_from([".csv", ".tsv"]),
    tasks,
)
def test_table(content: bytes, suffix: str, task: Any) -> None:
    read(DIRECTORY / f"data{suffix}", content, task)


def parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    rows = [{"question": "a", "answer": "b", "label": 1, "text": "a b"}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


PARQUET = parquet()


@examples(100)
@given(st.integers(0, len(PARQUET) - 1), st.binary(max_size=4), tasks)
def test_parquet(place: int, noise: bytes, task: Any) -> None:
    content = PARQUET[:place] + noise + PARQUET[place + len(noise) :]
    read(DIRECTORY / "data.parquet", content if noise else PARQUET[:place], task)
