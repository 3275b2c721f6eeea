"""DART: triples (subject, relation, object) to sentences; several references a record.

Nan et al. 2021, https://aclanthology.org/2021.naacl-main.37. Fields tripleset, annotations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssm_train.data.published import OFFICIAL, Published, parquet_of
from ssm_train.data.tasks.text import GenerationTask

DART = GenerationTask(
    prompt=["facts :", " {tripleset}", " \ndescription :"],
    label=" {annotations}",
    references="each",
    metrics=["bleu", "meteor", "rougeL"],
)


def clean(record: dict[str, Any]) -> dict[str, Any] | None:
    """Triples and the texts of the annotations; None where no annotation has text."""
    texts = [text for text in list_texts(record["annotations"]) if text.strip()]
    return {"tripleset": record["tripleset"], "annotations": texts} if texts else None


def list_texts(annotations: Any) -> list[str]:
    """The official files have a list of {source, text}, the hub's {source: [...], text: [...]};
    a list of texts, or one text, will do. Raises ValueError for anything else."""
    if isinstance(annotations, Mapping):
        annotations = annotations.get("text")
    elif isinstance(annotations, str):
        annotations = [annotations]
    if not isinstance(annotations, list):
        raise ValueError("field 'annotations' is neither a list nor has one in 'text'")
    texts: list[Any] = [
        item.get("text") if isinstance(item, Mapping) else item for item in annotations
    ]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("field 'annotations' has an annotation without text")
    return texts


def _files(hub: str, official: str) -> tuple[str, ...]:
    name = f"dart-v1.1.1-full-{official}.json"
    return (
        f"default/{hub}/*.parquet",
        *parquet_of(hub),
        name,
        f"data/v1.1.1/{name}",
        f"{hub}.jsonl",
        f"{official}.jsonl",
    )


DATASETS = {
    "dart": Published(
        task=DART,
        folders=("dart", "Yale-LILY/dart", "GEM/dart"),
        files={
            "train": _files("train", "train"),
            "validation": (*_files("validation", "dev"), "val.jsonl"),
            "test": _files("test", "test"),
        },
        hub="Yale-LILY/dart",
        hub_revision="refs/convert/parquet",
        splits=OFFICIAL,
        clean=clean,
        source="the files are at https://github.com/Yale-LILY/dart",
    )
}
