"""What a suite is: a named list of configs in `suites.yaml`. Which configs a command line asks
for, in which rounds, and that each of them exists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_train.errors import InputError, near
from ssm_train.strict_yaml import read_document

SUITE = re.compile(r"[Ee][0-9]+")
ALL_SUITES = "ALL"
SKIP_DONE = "--skip-done"


@dataclass(frozen=True)
class Request:
    """What the words after the script's name ask for."""

    suite: str
    """Its name in capitals, or "ALL": the lists of all suites, one after the other."""
    rounds: tuple[str, ...]
    """As given: numbers, or "all"."""
    skip_done: bool


def parse_request(words: Sequence[str]) -> Request:
    """Reads `[SUITE] [ROUND ...|all] [--skip-done]`. Raises InputError for another option."""
    skip_done = SKIP_DONE in words
    words = [word for word in words if word != SKIP_DONE]
    for word in words:
        if word.startswith("-"):
            raise InputError(
                f"unknown option {word!r}; the options are {SKIP_DONE} and --help"
                f"{near(word, [SKIP_DONE, '--help'])}"
            )
    if words and SUITE.fullmatch(words[0]):
        return Request(words[0].upper(), tuple(words[1:]) or ("all",), skip_done)
    return Request(ALL_SUITES, tuple(words) or ("1",), skip_done)


def read_suites(path: Path) -> dict[str, list[str]]:
    """Suite -> file names of its configs; `.yaml` may be left out there. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}, which lists the suites, does not exist; set EXP_ROOT")
    document = read_document(path)
    suites = {}
    for suite, names in document.values.items():
        place = document.where((suite,))
        if not SUITE.fullmatch(str(suite)):
            raise InputError(f"{place}: {suite!r} is not a suite's name; use E and a number")
        if str(suite).upper() in suites:
            raise InputError(f"{place}: suite {suite} stands twice; keep one")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{place}: suite {suite} is not a list of config names")
        suites[str(suite).upper()] = [with_suffix(name) for name in names]
    return suites


def with_suffix(name: str) -> str:
    return name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"


def select_configs(suites: Mapping[str, list[str]], suite: str, source: Path) -> list[str]:
    """The configs of one suite or, for "ALL", of all. Raises InputError naming those there are."""
    if suite == ALL_SUITES:
        configs = [name for names in suites.values() for name in names]
        if not configs:
            raise InputError(f"{source} has no suite with a config in it")
        return configs
    if suite not in suites:
        raise InputError(
            f"suite {suite} is not in {source}; it has {' '.join(suites) or 'none'}"
            f"{near(suite, suites)}"
        )
    if not suites[suite]:
        full = " ".join(name for name, names in suites.items() if names)
        raise InputError(f"suite {suite} in {source} is empty; others are {full or 'empty too'}")
    return suites[suite]


def drop_repeated(configs: Sequence[str]) -> tuple[list[str], list[str]]:
    """(each config once, those that stood more than once). A run directory is named after its
    config's stem, so two jobs of one stem would write over each other.

    Raises InputError for two different configs of one stem.
    """
    owners: dict[str, str] = {}
    for name in configs:
        other = owners.setdefault(Path(name).stem, name)
        if other != name:
            raise InputError(
                f"{other} and {name} would write to one run directory, {Path(name).stem}; "
                "rename one"
            )
    unique = list(owners.values())
    return unique, [name for name in unique if configs.count(name) > 1]


def cut_rounds(configs: Sequence[str], n_slots: int) -> list[tuple[str, ...]]:
    """Rounds of `n_slots` configs, the last with what is left."""
    return [tuple(configs[i : i + n_slots]) for i in range(0, len(configs), n_slots)]


def select_rounds(asked: Sequence[str], count: int) -> list[int]:
    """Numbers from 1 to `count`, in the order asked for; "all" means each. Raises InputError."""
    valid = [str(number) for number in range(1, count + 1)]
    for word in asked:
        if word not in (*valid, "all"):
            raise InputError(f"Invalid round '{word}'. Valid values: {' '.join(valid)} or 'all'.")
    if "all" in asked:
        return list(range(1, count + 1))
    return [int(word) for word in dict.fromkeys(asked)]


def check_configs_exist(configs: Sequence[str], cfg_dir: str) -> None:
    """Raises InputError naming every config that is not there."""
    missing = [path for name in configs if not (path := Path(cfg_dir) / name).is_file()]
    if missing:
        lines = "".join(f"\n  {path}" for path in missing)
        raise InputError(f"Missing configs (expected under {cfg_dir}):{lines}")
