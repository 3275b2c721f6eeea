"""Alpaca: 52,000 instructions, some with an input, and answers that a model wrote.

Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca. Fields instruction, input, output.
"""

from __future__ import annotations

from typing import Any

from ssm_train.data.published import Part, Published, parquet_of
from ssm_train.data.tasks.text import GenerationTask

ALPACA = GenerationTask(
    prompt=["Do what is asked.\n\n", "Request: {instruction}", "{input_section}", "\n\nAnswer:"],
    label=" {output}",
    metrics=["rougeL", "bleu"],
)


def clean(record: dict[str, Any]) -> dict[str, Any] | None:
    """`input_section` is empty for an instruction without input; None for an empty output."""
    given, output = (record["input"] or "").strip(), record["output"]
    if output is None or not output.strip():
        return None
    section = f"\n\nInput: {given}" if given else ""
    return {"instruction": record["instruction"], "input_section": section, "output": output}


DATASETS = {
    "alpaca": Published(
        task=ALPACA,
        folders=("alpaca", "tatsu-lab/alpaca", "stanford_alpaca"),
        files={"train": (*parquet_of("train"), "alpaca_data.json")},
        hub="tatsu-lab/alpaca",
        splits={"train": Part("train", "kept"), "val": Part("train", "held_out")},
        clean=clean,
        source="the file alpaca_data.json is at https://github.com/tatsu-lab/stanford_alpaca",
    )
}
