"""Spider: questions about a database become SQL queries (Yu et al. 2018, arXiv 1809.08887).

The task is here. schema.py: tables.json and prompts; parse.py, components.py, match.py: exact
match and hardness; execute.py: execution accuracy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from ssm_train.data.records import json_type
from ssm_train.data.tasks.spider.components import Query
from ssm_train.data.tasks.spider.execute import Database
from ssm_train.data.tasks.spider.match import LEVELS, judge_hardness, match_exactly
from ssm_train.data.tasks.spider.schema import parse_schema
from ssm_train.data.tasks.task import Record, Rendered, ask
from ssm_train.data.tasks.text import check_metrics, field_value
from ssm_train.errors import InputError
from ssm_train.settings import Settings

METRICS = ("execution", "exact_match")

_SPACE = re.compile(r"""('(?:[^']|'')*'|"(?:[^"]|"")*")|\s+""")


class SpiderTask(Settings):
    """The label is a query, ended by the end-of-text token."""

    type: Literal["spider"] = "spider"
    metrics: list[str] = Field(default=list(METRICS), min_length=1)
    """Of execution (needs the databases), exact_match; the first one chooses the best
    checkpoint."""
    seconds: float = Field(default=10.0, gt=0)
    """Time limit of a query on its database."""

    _check_metrics = check_metrics(METRICS)

    def render(self, record: Record, *, training: bool) -> list[Rendered]:
        """One example of question, query, db_id, schema (by `linearise`) and database (path of
        its SQLite file, or ""). Raises InputError without a place: field missing, not text, empty;
        in evaluation, no database where `execution` is measured.
        """
        texts = {
            field: _read_text(record, field)
            for field in ("question", "query", "db_id", "schema", "database")
        }
        for field in ("question", "query", "schema"):
            if not texts[field].strip():
                raise InputError(f"field {field!r} is empty")
        if not training and "execution" in self.metrics:
            _check_database(texts["db_id"], texts["database"])
        question, query = " ".join(texts["question"].split()), tidy(texts["query"])
        prompt = (
            "Write the SQLite query that answers the question.\n",
            f"Tables: {texts['schema']}\nQuestion: {question}\n",
            "Query:",
        )
        known = {field: texts[field] for field in ("db_id", "schema", "database")}
        return [ask(prompt, f" {query}", (query,), "" if training else json.dumps(known))]

    def score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        contexts: Sequence[str],
    ) -> dict[str, float]:
        """Shares of right predictions, over all and by hardness of the gold query, such as
        `execution` and `execution_easy`; and `invalid_sql`, the share that is no SQL query.

        Raises InputError: a gold query that cannot be read or fails, a database that is missing or
        broken, a schema that `linearise` did not write.
        """
        examples = [
            _Example(p.strip(), gold, **json.loads(context))
            for p, (gold, *_), context in zip(predictions, references, contexts, strict=True)
        ]
        golds, answers = _parse_all(examples)
        levels = [judge_hardness(gold) for gold in golds]
        values: dict[str, float] = {}
        for metric in self.metrics:
            if metric == "execution":
                ordered = [gold.last.order != () for gold in golds]
                right = _execute_all(examples, ordered, self.seconds)
            else:
                right = [
                    answer is not None and match_exactly(answer, gold, parse_schema(e.schema))
                    for e, answer, gold in zip(examples, answers, golds, strict=True)
                ]
            values[metric] = sum(right) / len(right)
            for level in LEVELS:
                of_level = [r for r, found in zip(right, levels, strict=True) if found == level]
                if of_level:
                    values[f"{metric}_{level}"] = sum(of_level) / len(of_level)
        return values | {"invalid_sql": answers.count(None) / len(answers)}


@dataclass(frozen=True)
class _Example:
    prediction: str
    gold: str
    db_id: str
    schema: str
    database: str


def _parse_all(examples: Sequence[_Example]) -> tuple[list[Query], list[Query | None]]:
    """The components of gold queries and of predictions; None for a prediction that is no query.

    Raises InputError for a gold query that is none.
    """
    from ssm_train.data.tasks.spider.parse import read_query

    golds, answers = [], []
    for example in examples:
        schema = parse_schema(example.schema)
        gold = read_query(example.gold, schema)
        if gold is None:
            raise InputError(
                f"{example.db_id}: the gold query {example.gold!r} is no SQL query; correct or "
                "leave out the record"
            )
        golds.append(gold)
        answers.append(read_query(example.prediction, schema))
    return golds, answers


def _execute_all(
    examples: Sequence[_Example], ordered: Sequence[bool], seconds: float
) -> list[bool]:
    """Whether each prediction returns the rows of its gold query; each database is opened once."""
    places: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        _check_database(example.db_id, example.database)
        places.setdefault(example.database, []).append(i)
    right = [False] * len(examples)
    for path, of_database in places.items():
        with Database(path, seconds) as database:
            for i in of_database:
                right[i] = database.agree(
                    examples[i].prediction, examples[i].gold, ordered=ordered[i]
                )
    return right


def _check_database(db_id: str, path: str) -> None:
    if not path or not Path(path).is_file():
        raise InputError(
            f"execution needs the database of db_id {db_id!r}, and {path or 'the record'} "
            f"{'is no file' if path else 'names none'}; put Spider's databases there, or measure "
            "without: task: {type: spider, metrics: [exact_match]}"
        )


def tidy(text: str) -> str:
    """Runs of white space as one space, but not within quotes."""
    return _SPACE.sub(lambda found: found[1] or " ", text.strip())


def _read_text(record: Record, field: str) -> str:
    value = field_value(record, field)
    if not isinstance(value, str):
        raise InputError(
            f"field {field!r} is {json_type(value)} {str(value)[:40]!r}; expected text"
        )
    return value
