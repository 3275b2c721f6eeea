"""Which commits of the hub a run is made from: a name and a branch say it only until they move."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ssm_train.adapters.loading import TOKENIZER_FILES, looks_like_hub_id
from ssm_train.data import DataSettings
from ssm_train.data.sources import find_source

SNAPSHOT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")


def hub_commits(
    data: DataSettings,
    splits: Iterable[str],
    model: str | None,
    revision: str | None,
    tokenizer: str | None,
) -> dict[str, str]:
    """Of model, tokenizer and data -> commit, for those whose files are in the hub's cache.

    `model` and `tokenizer`: hub ids or directories, as they were loaded; nothing is downloaded.
    """
    files: dict[str, Path | None] = {}
    if model is not None:
        files["model"] = cached(model, ("config.json",), revision)
    if tokenizer is not None:
        own = revision if tokenizer == model else None
        files["tokenizer"] = cached(tokenizer, TOKENIZER_FILES, own)
    for split in splits:
        files[f"data ({split})"] = next(iter(find_source(data, split).files), None)
    return {name: match[1] for name, path in files.items() if (match := SNAPSHOT.search(str(path)))}


def cached(source: str, names: Iterable[str], revision: str | None) -> Path | None:
    """The first of these files that a directory, or the cache of a hub id, has."""
    from huggingface_hub import try_to_load_from_cache

    directory = Path(source).expanduser()
    for name in names:
        found: object = None
        if directory.is_dir():
            found = str(directory.resolve() / name)
        elif looks_like_hub_id(source):
            found = try_to_load_from_cache(source, name, revision=revision)
        if isinstance(found, str) and Path(found).is_file():
            return Path(found)
    return None
