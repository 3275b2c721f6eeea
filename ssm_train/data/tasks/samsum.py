"""SAMSum: chats between friends and their summaries.

Gliwa et al. 2019, https://aclanthology.org/D19-5409. Fields id, dialogue, summary.
"""

from __future__ import annotations

from typing import Any

from ssm_train.data.published import OFFICIAL, Published, parquet_of
from ssm_train.data.tasks.text import GenerationTask

SAMSUM = GenerationTask(
    prompt=["Sum up the chat.\n\n", "{dialogue}", "\n\nSummary:"],
    label=" {summary}",
    metrics=["rougeL", "rouge1", "rouge2"],
)


def clean(record: dict[str, Any]) -> dict[str, Any] | None:
    """Dialogue with one kind of line end, and summary; None for the one training record that has
    a summary of nothing."""
    dialogue, summary = record["dialogue"], record["summary"]
    if dialogue is None or not dialogue.strip():
        return None
    return {"dialogue": dialogue.replace("\r\n", "\n"), "summary": summary}


DATASETS = {
    "samsum": Published(
        task=SAMSUM,
        folders=("samsum", "knkarthick/samsum"),
        files={
            "train": (*parquet_of("train"), "train.csv", "train.json"),
            "validation": (*parquet_of("validation"), "validation.csv", "val.json"),
            "test": (*parquet_of("test"), "test.csv", "test.json"),
        },
        hub="knkarthick/samsum",
        splits=OFFICIAL,
        clean=clean,
        source="the files are those of the hub's knkarthick/samsum, or train.json, val.json and "
        "test.json of the release",
    )
}
