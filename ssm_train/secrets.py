"""What looks like a key or a token: it has no place in a config, and is never written down."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ssm_train.errors import InputError

HIDDEN = "<hidden>"
SECRET = re.compile(
    # Tokens, by the prefixes and lengths of those who give them out.
    r"\b(?:(?:hf|api_org|gh[pousr])_[A-Za-z0-9]{30,}|(?:github_pat|wandb_v1)_\w{30,}"
    r"|(?:glpat-|xox[abp]-|sk-(?=[\w-]*\d))[\w-]{20,}|AKIA[0-9A-Z]{16}\b)"
    r"|(?<=://)[^\s/@]+@"  # user and password of a URL
    r"|(?<=[?&])(?i:[\w-]*(?:token|key|secret|password|signature))=[^\s&#]+"  # in its query
)
NAMED = re.compile(
    r"(?i)^[-\w.]*(?:token|secret|password|passwd|api[-_]?key|authorization|credentials?)$"
)


def redact(text: str) -> str:
    """The text without what looks like a secret."""
    return SECRET.sub(HIDDEN, text)


def redact_command(words: Sequence[str]) -> list[str]:
    """A command line without secrets: `--api-key x`, `--api-key=x` and `API_KEY=x` too."""
    shown = []
    follows = False
    for word in words:
        name, equals, _ = word.partition("=")
        if follows and not word.startswith("-"):
            shown.append(HIDDEN)
        else:
            shown.append(f"{name}={HIDDEN}" if equals and NAMED.match(name) else redact(word))
        follows = word.startswith("-") and bool(NAMED.match(word))
    return shown


def refuse_secrets(where: str, values: Mapping[Any, Any]) -> None:
    """Raises InputError for a config that holds what looks like a token or a password."""
    for key in find_secrets(dict(values)):
        raise InputError(
            f"{where}: {redact(key) or 'a key'} holds what looks like a token or a password, and "
            "a config is written into the files of its run; give it in the environment "
            "(HF_TOKEN, WANDB_API_KEY), or log in"
        )


def find_secrets(values: Any, path: str = "") -> Iterator[str]:
    """The dotted keys whose values, or names, look like a secret."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from find_secrets(str(key), path)
            yield from find_secrets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from find_secrets(value, path)
    elif isinstance(values, str) and SECRET.search(values):
        yield path
