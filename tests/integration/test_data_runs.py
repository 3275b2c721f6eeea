"""Whole runs on chats, plain text and Spider: what is learnt, measured and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from spider_library import write_database, write_tables
from tiny_runs import losses, make_records, metrics, train, write_config
from transformers import AutoTokenizer

from ssm_train.cli import main
from ssm_train.finished import generate_from

WITHOUT_TASK = {"task": None, "val_data": None, "logging_steps": 4}


def write_splits(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> str:
    folder.mkdir()
    for split, records in rows.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return str(folder)


def chat_of(record: dict[str, str]) -> dict[str, Any]:
    turns = [("user", record["question"]), ("assistant", record["answer"])] * 2
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.mark.parametrize("packing", [False, True])
def test_chats_train_with_a_template_that_is_saved(packing: bool, tmp_path: Path) -> None:
    data = write_splits(
        tmp_path / "chats",
        {"train": [chat_of(r) for r in make_records(24)], "val": [chat_of(make_records(1, 40)[0])]},
    )
    changes: dict[str, Any] = {"packing": True, "tokens_per_batch": 128, "batch_size": None}
    result = train(
        write_config(
            tmp_path, "chat", "gla", data=data,
            **WITHOUT_TASK | {"task": {"type": "chat", "template": "plain"}},
            eval_gen={"max_new_tokens": 8}, max_steps=12, eval_steps=12,
            eval_at_start=True,
            **(changes if packing else {}),
        )
    )  # fmt: skip
    before, after = losses(result.run_dir, "val")
    assert after < before
    assert result.main_metric == "rougeL" and len(result.rows) == 1
    assert result.rows[0].labels == [make_records(1, 40)[0]["answer"]]
    tokenizer = AutoTokenizer.from_pretrained(result.run_dir / "model")
    prompt = tokenizer.apply_chat_template(
        chat_of(make_records(1, 40)[0])["messages"][:3], tokenize=True,
        add_generation_prompt=True, return_dict=False,
    )  # fmt: skip
    assert result.rows[0].input_ids == prompt


def test_text_is_packed_cut_and_measured_by_its_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"{r['question']} => {r['answer']}"} for r in make_records(40)]
    long = {"text": " ".join(row["text"] for row in rows[:8])}
    blank = {"text": " "}
    data = write_splits(
        tmp_path / "text", {"train": [blank, *rows, long, blank], "val": [*rows[:5], blank]}
    )
    result = train(
        write_config(
            tmp_path, "text", "mamba", data=data, **WITHOUT_TASK,
            packing=True, tokens_per_batch=64, batch_size=None, max_steps=12, eval_steps=12,
        )
    )  # fmt: skip
    assert result.main_metric == "loss" and result.after["loss"] < losses(result.run_dir)[0]
    assert not list(result.run_dir.glob("predictions-*"))
    answers = generate_from(
        result.run_dir, ["say one"], checkpoint="best", device="cpu", max_new_tokens=4, num_beams=1
    )
    assert len(answers) == 1
    said = capsys.readouterr().out.splitlines()
    assert f"{data}: 2 blank text(s) skipped, first train.jsonl:1" in said
    in_val = f"{data}: 1 blank text(s) skipped, first val.jsonl:6"
    assert in_val in said
    assert main(["eval", str(result.run_dir), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["loss"] == pytest.approx(result.after["loss"])
    assert in_val in output.err.splitlines()


def test_a_test_split_of_another_task_has_its_own_metrics(tmp_path: Path) -> None:
    """Trained on RTE, tested on CoLA, whose one metric is not the one that chooses the best."""
    rows = [
        {"sentence1": f"one {i}", "sentence2": "two", "sentence": "three", "label": i % 2}
        for i in range(20)
    ]
    for name in ("rte", "cola"):
        folder = tmp_path / "data" / "glue" / name
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}-0.parquet")
    result = train(
        write_config(
            tmp_path, "rte", "mamba", data="glue-tvt_rte", test_data="glue-tvt_cola",
            data_root=str(tmp_path / "data"), **WITHOUT_TASK, max_steps=4,
        )
    )  # fmt: skip
    assert result.main_metric == "accuracy" and "mcc" in result.test
    assert "mcc" not in result.after and "accuracy" not in result.test


@pytest.mark.parametrize("tested", [True, False])
def test_a_published_data_set_without_test_files_says_so(
    tested: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data" / "glue" / "cola"
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist([{"sentence": f"one {i}", "label": i % 2} for i in range(20)])
    for split in ("train", "validation") if tested else ("train",):
        parquet.write_table(table, folder / f"{split}-0.parquet")
    result = train(
        write_config(
            tmp_path, "cola", "mamba", data="glue-tvt_cola", data_root=str(tmp_path / "data"),
            **WITHOUT_TASK, max_steps=2,
        )
    )  # fmt: skip
    said = [line for line in capsys.readouterr().out.splitlines() if "is tested" in line]
    assert bool(result.test) == tested == (not said)
    for line in said:
        assert f"{folder} has no file for the validation split; expected validation-*" in line


def test_spider_is_measured_on_its_databases(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "spider"
    (folder / "database" / "library").mkdir(parents=True)
    write_database(folder / "database" / "library" / "library.sqlite")
    write_tables(folder / "tables.json")
    question = {"db_id": "library", "question": "names ?", "query": "SELECT name FROM author"}
    for name, count in {"train_spider.json": 40, "dev.json": 3}.items():
        (folder / name).write_text(json.dumps([question] * count), encoding="utf-8")
    result = train(
        write_config(
            tmp_path, "spider", "gla", data="spider-tvt", data_root=str(tmp_path / "data"),
            **WITHOUT_TASK, eval_gen={"max_new_tokens": 8}, max_steps=24, eval_steps=12,
            eval_at_start=True, learning_rate=2e-2,
        )
    )  # fmt: skip
    first, *_, last = metrics(result.run_dir, "val")
    assert first["execution"] == 0 and first["invalid_sql"] == 1
    assert last["execution"] == last["execution_easy"] == last["exact_match"] == 1
    assert result.main_metric == "execution" and result.test["execution"] == 1
    assert (result.run_dir / f"predictions-test-{result.best_step}.jsonl").is_file()


def test_a_resume_on_other_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, "run", "mamba", skip_eval=True, max_steps=2)
    train(config)
    file = tmp_path / "train.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(lines)))
    assert main(["train", "--cfg", str(config), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --resume: the training data were 24 examples of ")
    assert "put them back, or start a new run" in error and error.count("\n") == 1
    file.write_text("".join(lines))
    assert main(["train", "--cfg", str(config), "--resume"]) == 0
