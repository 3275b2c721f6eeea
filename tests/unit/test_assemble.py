"""How many examples of each split a run reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssm_train.assemble import (
    check_same_run,
    describe_measures,
    load_examples,
    select_kernels,
)
from ssm_train.config import RunConfig, dump_yaml
from ssm_train.data.sources import find_task
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError

CLASSES = {
    "type": "classification",
    "prompt": "{n}",
    "label_field": "n",
    "labels": {"1": "odd", "2": "even"},
}


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


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [
        ({}, "auto"),
        ({"backend": "torch"}, "reference"),
        ({"backend": "torch", "kernels": "triton"}, "triton"),
        ({"kernels": "reference"}, "reference"),
    ],
)
def test_another_backend_is_plain_pytorch(
    run: dict[str, Any], changes: dict[str, Any], kernels: str
) -> None:
    assert select_kernels(RunConfig(**run, **changes)) == kernels


@pytest.mark.parametrize(
    ("changes", "metric", "said"),
    [
        ({}, "loss", "best by loss; without eval_gen nothing is generated: no bleu, rougeL, exact"),
        ({"eval_gen": {"num_beams": 2}}, "bleu", "best by bleu"),
        ({"skip_eval": True}, "loss", "no evaluation (skip_eval)"),
        (
            {"eval_gen": {}, "task": CLASSES},
            *("accuracy", "best by accuracy; eval_gen changes nothing"),
        ),
    ],
)
def test_the_start_says_what_is_measured(
    run: dict[str, Any], changes: dict[str, Any], metric: str, said: str
) -> None:
    cfg = RunConfig(**run | changes)
    assert describe_measures(cfg, find_task(cfg), metric).startswith(said)


def test_a_changed_override_is_shown_without_those_not_given(
    run: dict[str, Any], tmp_path: Path
) -> None:
    run |= {"name": "run", "peft": "lora.json"}
    (tmp_path / "cfg.yaml").write_text(dump_yaml(RunConfig(**run)), encoding="utf-8")
    cfg = RunConfig(**run)
    assert check_same_run(cfg, tmp_path) == (cfg, [])
    with pytest.raises(InputError, match=r"peft_overrides was {} .* and is {'r': 4} now"):
        check_same_run(RunConfig(**run, peft_overrides={"r": 4}), tmp_path)
