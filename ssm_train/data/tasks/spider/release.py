"""Where Spider's files are: the official release, or the hub's records beside its tables.json and
databases, which the hub does not have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ssm_train.data.published import Published, parquet_of, read_files
from ssm_train.data.records import Numbered, Records
from ssm_train.data.tasks.spider import SpiderTask
from ssm_train.data.tasks.spider.schema import linearise, read_schemas
from ssm_train.errors import InputError

TABLES, DATABASES = "tables.json", "database"


def read_release(files: Sequence[Path]) -> Records:
    """The records of a split with the schema of their database, as text, and its SQLite file."""
    folder = find_tables(files[0])
    schemas = {name: linearise(schema) for name, schema in read_schemas(folder / TABLES).items()}
    records = read_files(files)

    def rows() -> Iterator[Numbered]:
        for number, record in records.rows:
            name = record.get("db_id")
            if name not in schemas:
                raise InputError(
                    f"{records.where(number)}: db_id {name!r} is not in {folder / TABLES}"
                )
            database = folder / DATABASES / name / f"{name}.sqlite"
            yield number, {**record, "schema": schemas[name], "database": str(database.resolve())}

    return replace(records, rows=rows())


def find_tables(file: Path) -> Path:
    """The folder of tables.json: the file's own, or one of the two above it."""
    for folder in file.absolute().parents[:3]:
        if (folder / TABLES).is_file():
            return folder
    raise InputError(
        f"data: spider: there is no {TABLES} beside {file} or above it; the official release has it"
    )


DATASETS = {
    "spider-tvt": Published(
        task=SpiderTask(),
        folders=("spider", "spider_data", "xlangai/spider"),
        files={
            "train": ("train_spider.json", *parquet_of("train"), "spider/train-*.parquet"),
            "validation": ("dev.json", *parquet_of("validation"), "spider/validation-*.parquet"),
        },
        read=read_release,
        beside=(TABLES,),
        holds_paths=True,  # of the databases
        source="unpack the official release there (train_spider.json, dev.json, tables.json, "
        "database/)",
    )
}
