"""A query as Spider's components: what it selects, joins, filters, groups and orders (Yu et al.
2018, section 5). Literal values are left out; a column is its table's, whatever the alias."""

from __future__ import annotations

from dataclasses import dataclass

from ssm_train.data.tasks.spider.schema import Name

ALL = Name("", "*")
AGGREGATES = ("max", "min", "count", "sum", "avg")
ARITHMETIC = ("+", "-", "*", "/")


@dataclass(frozen=True)
class Call:
    """An aggregate of a term, or two terms and an operator between them."""

    function: str
    terms: tuple[Term, ...]
    distinct: bool = False


@dataclass(frozen=True)
class Condition:
    """One comparison; `queries` are the subqueries it compares with, values are left out."""

    term: Term
    operator: str
    negated: bool = False
    queries: tuple[Query, ...] = ()


@dataclass(frozen=True)
class Filter:
    """The conditions of WHERE, HAVING or ON, in their order; brackets are left out."""

    conditions: tuple[Condition, ...] = ()
    connectors: tuple[str, ...] = ()
    """`and`, `or`: what stands between them."""


@dataclass(frozen=True)
class Query:
    """One SELECT, and the query that a set operation combines it with."""

    select: tuple[Term, ...]
    tables: tuple[str | Query, ...]
    joins: Filter = Filter()
    where: Filter = Filter()
    group: tuple[Term, ...] = ()
    having: Filter = Filter()
    order: tuple[Term, ...] = ()
    direction: str = ""
    """`asc` or `desc`: the one that is written last, `asc` where none is; empty without order."""
    limited: bool = False
    distinct: bool = False
    others: frozenset[str] = frozenset()
    """What Spider's grammar lacks: left, right, full, natural, offset, with, unknown names."""
    operation: str = ""
    """`union`, `union all`, `intersect` or `except`, and with what:"""
    operand: Query | None = None

    @property
    def last(self) -> Query:
        """The last SELECT of set operations; it has the ORDER BY and the LIMIT of them all."""
        return self.operand.last if self.operand else self


Term = Name | Call | Query | str
"""A column, what is computed of columns, a subquery; text for anything that Spider lacks."""
