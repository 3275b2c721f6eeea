"""Spider's exact set match of two queries, and how hard a query is (Yu et al. 2018, section 5).

Both count as the benchmark's own evaluation does, but for the mistakes of its parser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from ssm_train.data.tasks.spider.components import (
    AGGREGATES,
    ARITHMETIC,
    Call,
    Condition,
    Filter,
    Query,
    Term,
)
from ssm_train.data.tasks.spider.schema import Name, Schema

LEVELS = ("easy", "medium", "hard", "extra")


def match_exactly(prediction: Query, gold: Query, schema: Schema) -> bool:
    """Whether the components are the same, values and DISTINCT left out.

    Differs from Spider's own evaluation (evaluation.py, process_sql.py) where its parser is wrong.
    Here `INNER JOIN`, `author T1`, `<>`, brackets around conditions and `count(*) AS n` are SQL;
    an alias holds in its own query, not in the whole text; what follows a query is not passed over
    (`LIMIT 1 OFFSET 2` is not `LIMIT 1`); in `price > pages OR year = 3` the OR counts; and no
    value in a subquery does, neither in FROM nor in its LIMIT.
    """
    return _same(_unify(prediction, schema), _unify(gold, schema))


def _same(a: Query, b: Query) -> bool:
    """Sets where order means nothing. Subqueries of conditions and of FROM have to be the same
    word by word, but for their values and aliases; so do GROUP BY with HAVING, and ORDER BY."""
    if a.operand is None or b.operand is None:
        same_operands = a.operand is b.operand
    else:
        same_operands = a.operation == b.operation and _same(a.operand, b.operand)
    return (
        same_operands
        and Counter(a.select) == Counter(b.select)
        and Counter(a.tables) == Counter(b.tables)
        and Counter(a.where.conditions) == Counter(b.where.conditions)
        and set(a.where.connectors) == set(b.where.connectors)
        and a.group == b.group
        and (not a.group or a.having == b.having)
        and (a.order, a.direction) == (b.order, b.direction)
        and _keywords(a) == _keywords(b)
    )


def _keywords(query: Query) -> set[str]:
    """The keywords in the outermost query, those of joins and of HAVING included."""
    present = {
        "where": query.where.conditions,
        "group": query.group,
        "having": query.having.conditions,
        "order": query.order,
        "limit": query.limited,
    }
    conditions, connectors = _conditions(query)
    words = {word for word, there in present.items() if there}
    words |= {condition.operator for condition in conditions} & {"in", "like"}
    words |= set(connectors) & {"or"}
    if any(condition.negated for condition in conditions):
        words.add("not")
    return words | query.others


def _conditions(query: Query) -> tuple[list[Condition], list[str]]:
    filters = (query.joins, query.where, query.having)
    return (
        [condition for each in filters for condition in each.conditions],
        [connector for each in filters for connector in each.connectors],
    )


# ---------------------------------------------------------------- columns that are one


def _unify(query: Query, schema: Schema) -> Query:
    """Without DISTINCT, and with one name for columns that a foreign key connects.

    Only columns of the tables in the outermost FROM, and not in subqueries of conditions.
    """
    twins = {name: first for name, first in schema.twins.items() if name.table in query.tables}
    return _rename(query, twins)


def _rename(query: Query, twins: Mapping[Name, Name]) -> Query:
    return replace(
        query,
        select=_rename_terms(query.select, twins),
        joins=_rename_filter(query.joins, twins),
        where=_rename_filter(query.where, twins),
        group=_rename_terms(query.group, twins),
        having=_rename_filter(query.having, twins),
        order=_rename_terms(query.order, twins),
        distinct=False,
        operand=query.operand and _rename(query.operand, twins),
    )


def _rename_filter(conditions: Filter, twins: Mapping[Name, Name]) -> Filter:
    renamed = [replace(c, term=_rename_term(c.term, twins)) for c in conditions.conditions]
    return replace(conditions, conditions=tuple(renamed))


def _rename_terms(terms: tuple[Term, ...], twins: Mapping[Name, Name]) -> tuple[Term, ...]:
    return tuple(_rename_term(term, twins) for term in terms)


def _rename_term(term: Term, twins: Mapping[Name, Name]) -> Term:
    if isinstance(term, Name):
        return twins.get(term, term)
    if isinstance(term, Call):
        return replace(term, terms=_rename_terms(term.terms, twins), distinct=False)
    return term


# ---------------------------------------------------------------- hardness


def judge_hardness(query: Query) -> str:
    """easy, medium, hard or extra, by how many clauses, subqueries and long lists there are."""
    clauses, nested, lists = _count_clauses(query), _count_nested(query), _count_lists(query)
    if nested:
        return "hard" if nested == 1 and clauses <= 1 and lists == 0 else "extra"
    if clauses <= 1 and lists == 0:
        return "easy"
    if (clauses <= 1 and lists <= 2) or (clauses <= 2 and lists < 2):
        return "medium"
    if (clauses <= 2 and lists > 2) or (clauses == 3 and lists <= 2):
        return "hard"
    return "extra"


def _count_clauses(query: Query) -> int:
    """WHERE, GROUP BY, ORDER BY and LIMIT, tables after the first, every OR and every LIKE."""
    conditions, connectors = _conditions(query)
    present = (query.where.conditions, query.group, query.order, query.limited)
    return (
        sum(map(bool, present))
        + max(0, len(query.tables) - 1)
        + connectors.count("or")
        + sum(condition.operator == "like" for condition in conditions)
    )


def _count_nested(query: Query) -> int:
    """Subqueries of conditions, and one for a set operation; those in FROM are not counted."""
    conditions, _ = _conditions(query)
    return sum(len(condition.queries) for condition in conditions) + (query.operand is not None)


def _count_lists(query: Query) -> int:
    """Which of aggregates, selected terms, conditions in WHERE and grouping columns are several.

    The benchmark takes NOT for an aggregate, and so it does AND and OR in HAVING.
    """
    aggregates = sum(map(_is_aggregate, (*query.select, *query.group)))
    for term in query.order:
        parts = term.terms if isinstance(term, Call) and term.function in ARITHMETIC else (term,)
        aggregates += sum(map(_is_aggregate, parts))
    aggregates += sum(c.negated for c in (*query.where.conditions, *query.having.conditions))
    aggregates += len(query.having.connectors)
    counts = (aggregates, len(query.select), len(query.where.conditions), len(query.group))
    return sum(count > 1 for count in counts)


def _is_aggregate(term: Term) -> bool:
    return isinstance(term, Call) and term.function in AGGREGATES
