"""Reads SQL as Spider's components. SQLite's own parser decides what is SQL, sqlglot reads it.

What an alias stands for is found in its own query first, then in those around it."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

from sqlglot import Dialect, ErrorLevel, TokenType, exp
from sqlglot.errors import SqlglotError

from ssm_train.data.tasks.spider.components import ALL, Call, Condition, Filter, Query, Term
from ssm_train.data.tasks.spider.schema import Name, Schema

SQLITE = Dialect.get_or_raise("sqlite")

AGGREGATE_OF: dict[type[exp.Expr], str] = {
    exp.Max: "max",
    exp.Min: "min",
    exp.Count: "count",
    exp.Sum: "sum",
    exp.Avg: "avg",
}
OPERATOR_OF: dict[type[exp.Expr], str] = {
    exp.Add: "+",
    exp.Sub: "-",
    exp.Mul: "*",
    exp.Div: "/",
}
COMPARISON_OF: dict[type[exp.Expr], str] = {
    exp.EQ: "=",
    exp.NEQ: "!=",
    exp.GT: ">",
    exp.LT: "<",
    exp.GTE: ">=",
    exp.LTE: "<=",
    exp.Between: "between",
    exp.In: "in",
    exp.Like: "like",
    exp.Is: "is",
}


SYNTAX_ERROR = re.compile("syntax error|incomplete input|unrecognized token|parser stack overflow")


def read_query(text: str, schema: Schema) -> Query | None:
    """The components of a query; None where the text is not one query in SQLite's dialect."""
    if not is_sql(text):
        return None
    try:
        tokens = SQLITE.tokenize(text)
        if not tokens or tokens[0].token_type not in (TokenType.SELECT, TokenType.WITH):
            return None
        statements = [e for e in SQLITE.parser().parse(tokens, text) if e is not None]
        if len(statements) != 1 or not isinstance(statements[0], exp.Query):
            return None
        return _read(statements[0], schema, None)
    except (SqlglotError, RecursionError):
        return None


def is_sql(text: str) -> bool:
    """Whether SQLite finds no mistake in the text, whatever the names in it."""
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.execute(f"EXPLAIN {text}")
        except (sqlite3.Warning, sqlite3.ProgrammingError, ValueError):
            return False  # two statements, a null character, half a surrogate pair
        except sqlite3.Error as error:
            return SYNTAX_ERROR.search(str(error)) is None
    return True


# ---------------------------------------------------------------- names


@dataclass(frozen=True)
class Scope:
    """What names mean in one query."""

    schema: Schema
    outer: Scope | None
    tables: dict[str, str] = field(default_factory=dict)
    """Alias -> table, in the order of FROM; "" for a subquery."""
    selected: dict[str, Term] = field(default_factory=dict)
    """Alias -> what it names in SELECT."""
    unknown: set[str] = field(default_factory=set)
    """Names that stand for no column."""

    def __iter__(self) -> Iterator[Scope]:
        """This query, then those around it."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer

    def find(self, column: exp.Column) -> Term:
        """The column of the table that an alias stands for; without one, of the first table of
        FROM that has it. A name that nothing has is kept as it is, and in `unknown`."""
        name, alias = column.name.lower(), column.table.lower()
        if alias:
            tables = (scope.tables[alias] for scope in self if alias in scope.tables)
            table = next(tables, alias)
            if name not in self.schema.columns.get(table, ()) and name != ALL.column:
                self.unknown.add(f"{table}.{name}")
            return Name(table, name)
        for scope in self:
            for table in scope.tables.values():
                if name in scope.schema.columns.get(table, ()):
                    return Name(table, name)
            if name in scope.selected:
                return scope.selected[name]
        if not column.this.quoted:  # "name" is a text where it is no column
            self.unknown.add(name)
        return Name("", name)


# ---------------------------------------------------------------- clauses


def _read(expression: exp.Expr, schema: Schema, outer: Scope | None) -> Query:
    """A SELECT, or several in a chain, which nests to the right as Spider's parser does it."""
    parts = _chain(expression)
    if (
        len(parts) > 1
    ):  # what comes after the last SELECT is for all of them; Spider leaves it there
        for clause in ("order", "limit", "offset"):
            parts[-1][1].set(clause, expression.args.get(clause))
    query, operation = None, ""
    for operation_before, select in reversed(parts):
        query = replace(_read_select(select, schema, outer), operation=operation, operand=query)
        operation = operation_before
    assert query is not None
    return replace(query, others=query.others | {"with"}) if expression.args.get("with_") else query


def _chain(expression: exp.Expr) -> list[tuple[str, exp.Expr]]:
    """The SELECTs of set operations, each with the operation before it."""
    expression = expression.unnest()
    if not isinstance(expression, exp.SetOperation):
        return [("", expression)]
    (_, first), *others = _chain(expression.expression)
    operation = expression.key + ("" if expression.args.get("distinct") else " all")
    return [*_chain(expression.this), (operation, first), *others]


def _read_select(select: exp.Expr, schema: Schema, outer: Scope | None) -> Query:
    """Raises SqlglotError where it is no SELECT, or selects nothing."""
    if not isinstance(select, exp.Select) or not select.expressions:
        raise SqlglotError("not a SELECT")
    clauses = select.args
    scope = Scope(schema, outer)
    joins: list[exp.Join] = clauses.get("joins") or []
    sources = [clauses["from_"].this] if clauses.get("from_") else []
    tables = tuple(_read_source(source, scope) for source in [*sources, *(j.this for j in joins)])
    terms = tuple(_read_term(term, scope) for term in select.expressions)
    for term, expression in zip(terms, select.expressions, strict=True):
        if isinstance(expression, exp.Alias):
            scope.selected[expression.alias.lower()] = term
    limit, ordered = clauses.get("limit"), _list(clauses.get("order"))
    query = Query(
        select=terms,
        tables=tables,
        joins=_read_filter([j.args["on"] for j in joins if j.args.get("on")], scope),
        where=_read_filter(_this(clauses.get("where")), scope),
        group=tuple(_read_term(term, scope) for term in _list(clauses.get("group"))),
        having=_read_filter(_this(clauses.get("having")), scope),
        order=tuple(_read_ordered(item, scope) for item in ordered),
        direction=_find_direction(ordered),
        limited=limit is not None,
        distinct=clauses.get("distinct") is not None,
    )
    others = {word.lower() for join in joins for word in (join.side, join.method) if word}
    if clauses.get("offset") or (limit and limit.args.get("offset")):
        others.add("offset")
    return replace(query, others=frozenset(others | scope.unknown))


def _this(clause: exp.Expr | None) -> list[exp.Expr]:
    return [clause.this] if clause else []


def _list(clause: exp.Expr | None) -> list[exp.Expr]:
    return clause.expressions if clause else []


def _read_source(source: exp.Expr, scope: Scope) -> str | Query:
    """A table's name or a subquery; makes its alias known."""
    alias = source.alias_or_name.lower()
    if isinstance(source, exp.Table) and isinstance(source.this, exp.Identifier):
        scope.tables[alias] = source.name.lower()
        return source.name.lower()
    scope.tables[alias] = ""
    if isinstance(source, exp.Subquery) and isinstance(source.unnest(), exp.Query):
        return _read(source, scope.schema, scope.outer)
    return _write(source, scope)


def _read_ordered(item: exp.Expr, scope: Scope) -> Term:
    term = item.this.unnest()
    if isinstance(term, exp.Column) and not term.table and term.name.lower() in scope.selected:
        return scope.selected[term.name.lower()]  # before columns of that name, as in SQLite
    return _read_term(term, scope)


def _find_direction(ordered: list[exp.Expr]) -> str:
    written = [item.args["desc"] for item in ordered if item.args.get("desc") is not None]
    if not ordered:
        return ""
    return "desc" if written and written[-1] else "asc"


# ---------------------------------------------------------------- conditions and terms


def _read_filter(expressions: Iterable[exp.Expr], scope: Scope) -> Filter:
    """Conditions of expressions that are joined by AND."""
    conditions: list[Condition] = []
    connectors: list[str] = []

    def visit(expression: exp.Expr) -> None:
        expression = expression.unnest()
        if isinstance(expression, exp.And | exp.Or):
            visit(expression.this)
            connectors.append(expression.key)
            visit(expression.expression)
        else:
            conditions.append(_read_condition(expression, scope))

    for expression in expressions:
        if conditions:
            connectors.append("and")
        visit(expression)
    return Filter(tuple(conditions), tuple(connectors))


def _read_condition(expression: exp.Expr, scope: Scope) -> Condition:
    negated = False
    while isinstance(expression, exp.Not):
        negated = not negated
        expression = expression.this.unnest()
    negated ^= bool(expression.args.get("negate"))
    if isinstance(expression, exp.Exists):
        return Condition("", "exists", negated, tuple(_read_queries(expression.this, scope)))
    if type(expression) not in COMPARISON_OF:
        return Condition(_read_term(expression, scope), "", negated)
    values = [value for key, value in expression.args.items() if key != "this"]
    queries = tuple(query for value in values for query in _read_queries(value, scope))
    term = _read_term(expression.this, scope)
    return Condition(term, COMPARISON_OF[type(expression)], negated, queries)


def _read_queries(value: object, scope: Scope) -> Iterator[Query]:
    """The subqueries in what a term is compared with; sees to unknown names, too."""
    if isinstance(value, exp.Query):
        yield _read(value, scope.schema, scope)
    elif isinstance(value, exp.Column):
        scope.find(value)
    elif isinstance(value, exp.Expr):
        for child in value.iter_expressions():
            yield from _read_queries(child, scope)
    elif isinstance(value, list):
        for item in value:
            yield from _read_queries(item, scope)


def _read_term(expression: exp.Expr, scope: Scope) -> Term:
    expression = expression.unalias().unnest()
    if isinstance(expression, exp.Column):
        return scope.find(expression)
    if isinstance(expression, exp.Star):
        return ALL
    if isinstance(expression, exp.Query):
        return _read(expression, scope.schema, scope)
    if function := AGGREGATE_OF.get(type(expression)):
        distinct = isinstance(expression.this, exp.Distinct)
        inner = expression.this.expressions if distinct else list(expression.iter_expressions())
        return Call(function, tuple(_read_term(term, scope) for term in inner), distinct)
    if function := OPERATOR_OF.get(type(expression)):
        sides = (expression.this, expression.expression)
        return Call(function, tuple(_read_term(side, scope) for side in sides))
    return _write(expression, scope)


def _write(expression: exp.Expr, scope: Scope) -> str:
    """An expression that Spider's grammar lacks as text, in which aliases do not matter."""

    def rename(node: exp.Expr) -> exp.Expr:
        found = scope.find(node) if isinstance(node, exp.Column) else None
        return exp.column(found.column, found.table) if isinstance(found, Name) else node

    return SQLITE.generate(
        expression.transform(rename), comments=False, unsupported_level=ErrorLevel.IGNORE
    )
