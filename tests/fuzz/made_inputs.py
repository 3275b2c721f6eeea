"""Strategies for what a user's files, words and variables may hold, from nearly right to noise."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st

from ssm_train.config import RunConfig
from ssm_train.errors import InputError, unusable

FACTOR = max(1, int(os.environ.get("SSM_TRAIN_FUZZ", "0")))
T = TypeVar("T")

TRAPS = [
    *("", " ", ".", "..", "../../x", "/", "~", "~nobody/x", "a/b", "a/b/c", "\x00", "\n", "a\nb"),
    *(
        "null",
        "true",
        "1",
        "-1",
        "1e400",
        "nan",
        "auto",
        "{",
        "[",
        "{}",
        "[1, 2",
        "&a",
        "*a",
        "!!x",
    ),
    *("{x.__class__}", "{0}", "{question!r}", "%s", "\U0001f600", "\u202e", "*" * 300, "9" * 5_000),
    *("2147483648", "\u00b2", "-0", "0x10", "(", "(a+)+$", "[a-", "\\"),
]
texts = st.one_of(st.integers(0, len(TRAPS) - 1).map(TRAPS.__getitem__), st.text(max_size=20))
numbers = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([2**31, 2**63, 10**30, -(10**30)]),
    st.floats(allow_nan=True, allow_infinity=True, width=32),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


def temporary_directory() -> Path:
    """A directory for as long as this process lives: property tests share their fixtures' files."""
    directory = Path(tempfile.mkdtemp(prefix="ssm_train_fuzz_"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def examples(count: int) -> Callable[[Any], Any]:
    """So many inputs in `make test`, SSM_TRAIN_FUZZ times as many in `make fuzz`."""
    return settings(max_examples=count * FACTOR)


def as_plain(default: Any) -> Any:
    return default.model_dump() if hasattr(default, "model_dump") else default


def misspelt(words: list[str]) -> st.SearchStrategy[str]:
    """One of the words, or nearly."""
    right = st.sampled_from(words)
    return st.one_of(right, right, right, right.map(lambda word: word[:-1]), texts)


def plausible(schema: Any = RunConfig) -> st.SearchStrategy[dict[str, Any]]:
    """A few keys of a settings class, most with values of their type."""
    pairs = []
    for key, field in schema.model_fields.items():
        words = [w for w in str(field.annotation).replace("'", '"').split('"')[1::2] if w]
        fitting = [values]
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            fitting.append(st.just({} if key == "peft_overrides" else as_plain(default)))
        if words:
            fitting.append(st.sampled_from(words))
        if "int" in str(field.annotation) or "float" in str(field.annotation):
            fitting += [st.integers(0, 20), st.floats(0, 1)]
        if "bool" in str(field.annotation):
            fitting.append(st.booleans())
        pairs.append(st.tuples(st.just(key), st.one_of(fitting)))
    pairs.append(st.tuples(misspelt(list(schema.model_fields)), values))
    return st.lists(st.one_of(pairs), max_size=4).map(dict)


def damaged(text: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """The text as bytes: whole, cut short, with some bytes changed, or twice."""

    def damage(text: str, kind: str, place: float, noise: bytes) -> bytes:
        content = text.encode("utf-8", "surrogatepass")
        at = int(place * len(content))
        return {
            "whole": content,
            "cut": content[:at],
            "changed": content[:at] + noise + content[at + len(noise) :],
            "longer": content[:at] + noise + content[at:],
            "twice": content + content,
        }[kind]

    return st.builds(
        damage,
        text,
        st.sampled_from(["whole", "whole", "cut", "changed", "longer", "twice"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=4),
    )


def as_json(value: Any) -> str:
    """JSON, with what Python writes beyond it (NaN)."""
    return json.dumps(value)


def attempt(action: Callable[[], T]) -> T | None:
    """The result, or None after an InputError that says something; all else is a failure."""
    try:
        return action()
    except InputError as error:
        assert str(error).strip(), "an empty message"
        return None
    except OSError as error:  # which the command line reports in the same way
        if unusable(error) is None:
            raise
        return None
