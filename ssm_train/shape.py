"""The sizes of a run's model, as `new_model` takes them, without its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from ssm_train.adapters import loading, registry
from ssm_train.adapters.base import ModelSpec
from ssm_train.adapters.mamba_checkpoint import is_original, map_config
from ssm_train.bases import base_run, load_base_config
from ssm_train.config import RunConfig

VOCABULARY = 32_000  # where the model's is not known before its tokenizer is


def model_shape(cfg: RunConfig) -> dict[str, Any]:
    """A model of the same sizes with random weights."""
    return {"vocab_size": VOCABULARY, **(cfg.new_model or checkpoint_shape(cfg))}


def names_vocabulary(cfg: RunConfig) -> bool:
    """Whether the size of the vocabulary is known without a tokenizer."""
    return "vocab_size" in (cfg.new_model or checkpoint_shape(cfg))


def checkpoint_shape(cfg: RunConfig) -> Mapping[str, Any]:
    """A checkpoint's configuration as `new_model` takes it."""
    assert cfg.model is not None
    if base_run(cfg) is not None:
        base, _ = load_base_config(cfg.model)
        return base.new_model or checkpoint_shape(base)
    values = loading.read_config(cfg.model, cfg.revision)
    spec = ModelSpec(model=cfg.model, adapter=cfg.adapter, revision=cfg.revision)
    adapter, _ = registry.resolve(spec)  # with it, transformers knows GLA
    if is_original(values):
        config = map_config(values)
    else:  # fla puts a Mamba of its own under transformers' name
        config_class = getattr(adapter, "config_class", AutoConfig)
        config = config_class.from_pretrained(
            cfg.model, revision=cfg.revision, trust_remote_code=False
        )
    known = {"model_type", *inspect.signature(type(config)).parameters}
    return {key: getattr(config, key) for key in known.intersection(config.to_diff_dict())}
