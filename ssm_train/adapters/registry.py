"""Which adapter a model gets, and why: the one table of model families."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from torch import nn

from ssm_train.adapters.base import ModelAdapter, ModelSpec
from ssm_train.adapters.loading import looks_like_hub_id, read_config
from ssm_train.adapters.mamba_checkpoint import family, is_original
from ssm_train.errors import InputError, near

Family = tuple[ModelAdapter, Callable[[Any], object]]
"""A family's adapter, and its `adopt`."""


def mamba() -> Family:
    from ssm_train.adapters import mamba

    return mamba.MAMBA, mamba.adopt


def mamba2() -> Family:
    from ssm_train.adapters import mamba

    return mamba.MAMBA2, mamba.adopt


def gla() -> Family:
    if find_spec("fla") is None or find_spec("triton") is None:
        raise InputError(
            "model: GLA needs flash-linear-attention and triton, which exist on Linux only: "
            "pip install 'flash-linear-attention>=0.6,<0.7' 'triton>=3.3'"
        )
    with warnings.catch_warnings():
        # fla's greeting on a CPU; the log says which kernels run.
        warnings.filterwarnings("ignore", message="Triton is not supported")
        from ssm_train.adapters import gla

    return gla.GLA, gla.adopt


def bamba() -> Family:
    from ssm_train.adapters import bamba

    return bamba.BAMBA, bamba.adopt


# model_type -> what imports its file; a new family is one line.
FAMILIES: dict[str, Callable[[], Family]] = {
    "mamba": mamba,
    "mamba2": mamba2,
    "gla": gla,
    "bamba": bamba,
}
# Relatives that look loadable and are not: a mixer of theirs, or attention between the mixers.
RELATIVES = (
    *("falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba3"),
    *("nemotron_h", "plamo2", "qwen3_next", "recurrent_gemma", "rwkv", "zamba", "zamba2"),
)


def resolve(spec: ModelSpec) -> tuple[ModelAdapter, str]:
    """The adapter of a model and the reason, for the log.

    In order: an explicit `adapter:`; the model_type of config.json (or of `new_model`); the layout
    of a mamba_ssm checkpoint; "gla" in a hub id whose config can't be read. Raises InputError.
    """
    check_transformers(metadata.version("transformers"))
    name, reason = choose_family(spec)
    adapter, _ = FAMILIES[name]()
    return adapter, f"{name}: {reason}"


def check_transformers(version: str) -> None:
    """Refuses releases that name the caches of decoding anew: with fla 0.6 and our forwards, cached
    decoding would go on without its state."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) >= (5, 24):
        raise InputError(
            f"transformers {version} is installed, but cached decoding is right up to 5.23 only: "
            "pip install 'transformers>=5.17,<5.24'"
        )


def choose_family(spec: ModelSpec) -> tuple[str, str]:
    """resolve(), without importing the family."""
    if spec.adapter is not None:
        if spec.adapter not in FAMILIES:
            raise InputError(
                f"adapter: {spec.adapter!r} does not exist{near(spec.adapter, FAMILIES)}; "
                f"supported: {', '.join(FAMILIES)}"
            )
        return spec.adapter, f"the config says adapter: {spec.adapter}"
    if spec.model is None:
        if not spec.new_model or "model_type" not in spec.new_model:
            raise InputError("model: give `model`, or `new_model` with its model_type")
        model_type = str(spec.new_model["model_type"])
        return check_supported(model_type, "new_model"), f"new_model has model_type {model_type}"
    try:
        config = read_config(spec.model, spec.revision)
    except InputError:
        if not looks_like_hub_id(spec.model):
            raise
        name = "gla" if "gla" in spec.model.lower() else "mamba"
        return name, f"by its name alone, as the config.json of {spec.model!r} can't be read"
    if "model_type" in config:
        model_type = str(config["model_type"])
        return check_supported(model_type, spec.model), f"config.json has model_type {model_type}"
    if is_original(config):
        return family(config), "config.json is mamba_ssm's own (d_model, n_layer, no model_type)"
    raise InputError(
        f"model: the config.json of {spec.model} has neither a model_type nor mamba_ssm's d_model "
        f"and n_layer; set `adapter:` to one of {', '.join(FAMILIES)}"
    )


def check_supported(model_type: str, model: str) -> str:
    if model_type in FAMILIES:
        return model_type
    kind = "a relative that is not supported" if model_type in RELATIVES else "not supported"
    raise InputError(
        f"model: {model} has model_type {model_type!r}, {kind}{near(model_type, FAMILIES)}; "
        f"supported: {', '.join(FAMILIES)}"
    )


def adopt(model: nn.Module) -> None:
    """Gives a stock model of a supported family our forwards, in place (as `prepare` does).

    For adapters that are loaded onto a model which somebody else made.
    """
    config: Any = model.config
    _, adopt_family = FAMILIES[check_supported(str(config.model_type), type(model).__name__)]()
    adopt_family(model)
