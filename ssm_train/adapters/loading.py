"""How configurations, weights and tokenizers are read, so that nothing wrong loads silently."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ssm_train.adapters.base import ModelSpec
from ssm_train.errors import InputError, near

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def read_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """The raw config.json of a directory or a hub model. Raises InputError saying what is amiss."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        path = directory / "config.json"
        if not path.is_file():
            raise InputError(
                f"model: {model} has no config.json; give the directory save_pretrained wrote "
                "(an adapter alone is not a model: merge it, or name its run config)"
            )
        return parse_json(path)
    if not looks_like_hub_id(model):
        raise InputError(f"model: there is no directory {model}")
    found = fetch(model, "config.json", revision)
    if found is None:
        raise InputError(
            f"model: {model!r} is not a directory, and no config.json of a hub model of that name "
            "is in the cache or can be fetched; check the name, HF_HUB_OFFLINE and the network"
        )
    return parse_json(found)


def parse_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def looks_like_hub_id(name: str) -> bool:
    """`gpt2` or `owner/name`; not something that can only be a path."""
    return not name.startswith(("/", ".", "~")) and name.count("/") <= 1


def fetch(model: str, file: str, revision: str | None) -> Path | None:
    """A file of a directory or of a hub model (cached or downloaded); None where there is none."""
    from transformers.utils import cached_file

    try:
        found = cached_file(model, file, revision=revision)
    except OSError:  # transformers' one type for: no such model, no such file, no network
        return None
    return Path(found) if found else None


def make_config(config_class: type, values: Mapping[str, Any], name: str = "new_model") -> Any:
    """A transformers configuration; keys and values that its class does not know are refused."""
    known = set(inspect.signature(config_class).parameters) - {"kwargs"}
    for key in values:
        if key not in known:
            raise InputError(
                f"{name}: {config_class.__name__} has no {key!r}{near(key, sorted(known))}"
            )
    try:
        return config_class(**values)
    except (StrictDataclassError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{name}: {' '.join(str(error).split())}") from error


def load_weights(model_class: Any, spec: ModelSpec) -> Any:
    """`spec.model` in fp32, whatever its file and config.json say: casting comes after, once.

    Raises InputError for missing files, and for names or shapes that differ from the model's:
    transformers would fill in random weights with a warning.
    """
    assert spec.model is not None
    where = {"device_map": "meta"} if spec.place == "meta" else {}
    with spec.init_context(), no_progress_bars(spec.model):
        try:
            model, report = model_class.from_pretrained(
                spec.model,
                revision=spec.revision,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they come back in the report
                **where,
            )
        except (OSError, StrictDataclassError) as error:
            raise InputError(f"model: {spec.model}: {' '.join(str(error).split())}") from error
    check_names(
        spec.model,
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        misshapen=[str(entry[0]) for entry in report["mismatched_keys"]],
    )
    return model


@contextmanager
def no_progress_bars(model: str | Path) -> Iterator[None]:
    """Keeps transformers' bars off the terminal for files that are here; a download shows them."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if shown and Path(model).expanduser().exists():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_model(model: Any, directory: Path) -> None:
    """Writes weights and configuration in transformers' format, without a word."""
    directory.mkdir(parents=True, exist_ok=True)
    with no_progress_bars(directory):
        model.save_pretrained(directory)


def load_or_make(model_class: Any, config_class: Any, spec: ModelSpec, tokenizer: Any) -> Any:
    """`spec.model` from its files, or `spec.new_model` with random weights, both in fp32.

    A new model that names no vocab_size gets one embedding per id of the tokenizer.
    """
    if spec.model is not None:
        return load_weights(model_class, spec)
    values = {key: value for key, value in (spec.new_model or {}).items() if key != "model_type"}
    if tokenizer is not None:
        values.setdefault("vocab_size", len(tokenizer))
    config = make_config(config_class, values)
    try:
        with spec.init_context():
            return model_class(config)
    except (AssertionError, KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())  # how libraries refuse sizes and names
        raise InputError(f"new_model: {config_class.__name__} cannot be built: {reason}") from error


def check_names(
    model: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    misshapen: Iterable[str] = (),
) -> None:
    """Raises InputError unless every weight of the model, and nothing else, was in the file."""
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    said = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, group in groups.items()
        if (names := sorted(group))
    ]
    if said:
        raise InputError(
            f"model: the weights of {model} do not fit its config.json: {'; '.join(said)}"
        )


def has_tokenizer(source: str, revision: str | None = None) -> bool:
    """Whether a directory or hub model brings a tokenizer.

    Asked before AutoTokenizer, which makes an empty one from a config.json alone.
    """
    return any(fetch(source, file, revision) is not None for file in TOKENIZER_FILES)


def load_tokenizer(spec: ModelSpec, default: str | None = None) -> Any:
    """The tokenizer named by the spec, else the checkpoint's own, else `default`; None for a new
    model without one. Where there is no pad token, end-of-text stands in: an id to fill rows
    with, never a reason to mask.
    """
    from transformers import AutoTokenizer

    source = spec.tokenizer
    if source is None and spec.model is None:
        return None
    if source is None:
        own = has_tokenizer(str(spec.model), spec.revision)
        source = str(spec.model) if own else default
    if source is None or not has_tokenizer(source, spec.revision if source == spec.model else None):
        raise InputError(
            f"tokenizer: {source or spec.model} has no tokenizer files that can be read here; set "
            "`tokenizer:` to a directory or hub id, or to {type: word, vocab_size: N}"
        )
    try:
        revision = spec.revision if source == spec.model else None
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer: {source}: {' '.join(str(error).split())}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer: {source} has no end-of-text token, so generation could not stop; set "
            "eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def align_tokenizer(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Gives the model the tokenizer's special ids, for generation; refuses one with more ids than
    the model has embeddings. None: nothing to do."""
    if tokenizer is None:
        return
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if len(tokenizer) > rows:
        raise InputError(
            f"tokenizer: it has {len(tokenizer)} ids but {name} has {rows} embeddings; choose the "
            "model's own tokenizer, or a larger vocab_size for a new model"
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token_id = getattr(tokenizer, key)
        for config in (model.config, model.generation_config):
            known = getattr(config, key)
            if not (isinstance(known, list) and token_id in known):  # several ends of text: kept
                setattr(config, key, token_id)
