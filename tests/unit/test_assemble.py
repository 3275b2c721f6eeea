"""How many examples of each split a run reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssm_train.assemble import load_examples
from ssm_train.config import RunConfig
from ssm_train.data.vocabulary import build_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    for split in ("train", "val", "test"):
        records = [json.dumps({"n": n, "name": split}) + "\n" for n in range(20)]
        (tmp_path / f"{split}.jsonl").write_text("".join(records), encoding="utf-8")
    task = {"type": "generation", "prompt": "{n} of", "label": " {name}"}
    return {"data": str(tmp_path), "task": task, "new_model": {"model_type": "mamba"}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (20, 20, 20)),
        ({"max_eval_examples": 7}, (20, 7, 7)),
        ({"max_eval_examples": 500}, (20, 20, 20)),
        ({"debug": True}, (8, 2, 2)),
        ({"debug": True, "max_eval_examples": 1}, (8, 1, 1)),
    ],
)
def test_examples_of_each_split(
    run: dict[str, Any], changes: dict[str, Any], expected: tuple[int, ...]
) -> None:
    cfg = RunConfig(**run, **changes)
    tokenizer = build_tokenizer(["a text"], {"type": "bpe", "vocab_size": 300})
    splits = {split: load_examples(cfg, tokenizer, split) for split in ("train", "val", "test")}
    assert tuple(len(examples) for examples in splits.values()) == expected
    first = tokenizer.decode(splits["val"].prompt_ids(0).tolist())
    assert first == "0 of"  # the first ones, in the file's order
