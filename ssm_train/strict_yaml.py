"""Reading and writing of configs: YAML 1.2 scalars (5e-4 is a number, `no` is text), every key
once and with its line, no aliases, no tags, bounded size and depth; JSON by the same rules."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssm_train.errors import InputError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20

KeyPath = tuple[Hashable, ...]

# The YAML 1.2 core schema instead of PyYAML's 1.1, where 5e-4 is text, `no` is false, 010 is
# eight, 1:30 is ninety and 2026-01-01 is a date.
CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
        "-+0123456789.",
    ),
)


class Loader(yaml.SafeLoader):
    """Safe loader of one document without anchors, aliases, tags or repeated keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases (& and *) are not allowed; write the value out",
                problem_mark=event.start_mark,
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"tags ({event.tag}) are not allowed; write the value alone",
                problem_mark=event.start_mark,
            )
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_DEPTH} levels deep", problem_mark=event.start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back equal."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        """Line breaks other than \\n are read back from double quotes alone."""
        style = '"' if re.search("[\r\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


Dumper.add_representer(str, Dumper.represent_text)

for _tag, _pattern, _first in CORE_SCHEMA:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}",
            re.compile(rf"^(?:{_pattern})$"),
            [c if c != "\0" else "" for c in _first],
        )


@dataclass(frozen=True)
class Document:
    """A mapping that was read from a file, with the line of every key."""

    source: str
    values: dict[Any, Any]
    lines: dict[KeyPath, int]

    def where(self, path: KeyPath) -> str:
        """`file:line` of the key at `path`, or of the nearest key above it."""
        for end in range(len(path), 0, -1):
            if line := self.lines.get(path[:end]):
                return f"{self.source}:{line}"
        return self.source


def read_document(path: Path) -> Document:
    """Reads a YAML or JSON (by its suffix) mapping. Raises InputError with file and line."""
    text = _read_text(path)
    if path.suffix.lower() == ".json":
        return _parse_json(text, str(path))
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Document:
    """Parses one YAML mapping. Raises InputError naming `source` and the line."""
    lines: dict[KeyPath, int] = {}
    loader = None
    try:
        loader = Loader(text)  # refuses control characters
        root = loader.get_single_node()
        if root is None:
            return Document(source, {}, {})
        _check_keys(root, (), lines, loader)
        values = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        reason = error.problem or error.context
        if error.context and (begin := error.context_mark):
            reason = f"{reason}, {error.context} that begins in line {begin.line + 1}"
        raise InputError(f"{place}: not valid YAML: {reason}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: not valid YAML: {reason}") from None
    except ValueError as error:  # a number of 5,000 digits
        raise InputError(f"{source}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(values, dict):
        raise InputError(
            f"{source}: the file holds a {type(values).__name__}; expected `key: value` lines"
        )
    return Document(source, values, lines)


def parse_value(text: str) -> Any:
    """The value that `text` would have in a config: `5e-4`, `null`, `{num_beams: 4}`, words."""
    try:
        return parse_yaml(f"value: {text}", "value").values["value"]
    except InputError:
        return text


def dump(values: dict[str, Any]) -> str:
    """YAML text, in the order of `values`."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def _read_text(path: Path) -> str:
    if not path.is_file():
        kind = "is a directory" if path.is_dir() else "does not exist"
        raise InputError(f"config file {path} {kind}; give a .yaml or .json file")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{path}: {size} bytes; a config has at most {MAX_BYTES}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _parse_json(text: str, source: str) -> Document:
    """JSON is YAML but for tabs and surrogate pairs: values from json, lines from YAML."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{source}: more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:  # a number of 5,000 digits
        raise InputError(f"{source}: not valid JSON: {error}") from None
    document = parse_yaml(text.replace("\t", " "), source)
    return Document(source, values, document.lines)


def _check_keys(
    node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], loader: yaml.SafeLoader
) -> None:
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _check_keys(child, (*path, i), lines, loader)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, child in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(
                problem="a key must be a word or a number", problem_mark=key_node.start_mark
            )
        line = key_node.start_mark.line + 1
        if (*path, key) in lines:
            raise yaml.MarkedYAMLError(
                problem=f"key {key!r} stands twice (first in line {lines[*path, key]}); keep one",
                problem_mark=key_node.start_mark,
            )
        lines[*path, key] = line
        _check_keys(child, (*path, key), lines, loader)
