"""mamba_ssm's own checkpoints: read as the transformers model they are equal to, and written from
one, for its `MambaLMHeadModel.from_pretrained`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from ssm_train.adapters import loading
from ssm_train.adapters.base import ModelSpec
from ssm_train.errors import InputError, near

# mamba_ssm's name -> transformers' name. What is None changes how to compute, not what.
SHARED = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
    "use_fast_path": None,
    "layer": None,
}
MAMBA1 = SHARED | {
    "dt_rank": "time_step_rank",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
}
MAMBA2 = SHARED | {
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "dt_limit": "time_step_limit",
    "chunk_size": "chunk_size",
    "use_mem_eff_path": None,
    "conv_init": None,
    "A_init_range": None,
}
# Where mamba_ssm's defaults differ from transformers'.
MAMBA2_DEFAULTS: dict[str, Any] = {"state_size": 128, "head_dim": 64, "n_groups": 1}
# Features with no equal in transformers' model: (in ssm_cfg, key, the only value that maps).
UNMAPPED: tuple[tuple[bool, str, tuple[Any, ...]], ...] = (
    (False, "attn_layer_idx", ([], None)),
    (False, "d_intermediate", (0, None)),
    (False, "rms_norm", (True,)),
    (True, "D_has_hdim", (False,)),
    (True, "rmsnorm", (True,)),
    (True, "norm_before_gate", (False,)),
    (True, "d_ssm", (None,)),
)
# What mamba_ssm computes whatever its config.json says: transformers' key -> values that mean it.
FIXED: dict[str, tuple[Any, ...]] = {
    "layer_norm_epsilon": (1e-5,),
    "hidden_act": ("silu", "swish"),
}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether this config.json is mamba_ssm's own."""
    return "d_model" in config and "n_layer" in config and "model_type" not in config


def family(config: Mapping[str, Any]) -> str:
    """ "mamba" or "mamba2"; any other kind of layer is an InputError."""
    layer = (config.get("ssm_cfg") or {}).get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise InputError(f"model: ssm_cfg.layer is {layer!r}; Mamba1 and Mamba2 can be loaded")
    return "mamba" if layer == "Mamba1" else "mamba2"


def map_config(config: Mapping[str, Any]) -> Any:
    """mamba_ssm's config.json -> MambaConfig or Mamba2Config.

    Raises InputError naming a feature that transformers' model does not have.
    """
    ssm = dict(config.get("ssm_cfg") or {})
    for inside, key, mapped in UNMAPPED:
        source = ssm if inside else config
        if key in source and source[key] not in mapped:
            raise InputError(
                f"model: this mamba_ssm checkpoint has {'ssm_cfg.' * inside}{key} = "
                f"{source[key]!r}, which cannot be mapped; only {mapped[0]!r} can"
            )
        if inside:
            ssm.pop(key, None)
    first = family(config) == "mamba"
    names = MAMBA1 if first else MAMBA2
    values: dict[str, Any] = {} if first else dict(MAMBA2_DEFAULTS)
    for key, value in ssm.items():
        if key not in names:
            raise InputError(f"model: unknown ssm_cfg.{key}{near(key, names)}")
        if (name := names[key]) is not None:
            values[name] = value
    multiple = config.get("pad_vocab_size_multiple", 8)
    values |= {
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "layer_norm_epsilon": 1e-5,
    }
    if not first:
        values["num_heads"] = values.get("expand", 2) * values["hidden_size"] // values["head_dim"]
    return loading.make_config(MambaConfig if first else Mamba2Config, values, "model: config.json")


def unmap_config(config: Any) -> dict[str, Any]:
    """MambaConfig or Mamba2Config -> mamba_ssm's config.json: the inverse of `map_config`.

    Raises InputError for another family, and for a value that mamba_ssm's model cannot have.
    """
    if config.model_type not in ("mamba", "mamba2"):
        raise InputError(
            f"format mamba_ssm: it holds Mamba-1 and Mamba-2, and this model is "
            f"{config.model_type}; use the format transformers"
        )
    for key, values in FIXED.items():
        if (value := getattr(config, key)) not in values:
            raise InputError(
                f"format mamba_ssm: {key} is {value!r}, and mamba_ssm computes with {values[0]!r} "
                "always; use the format transformers"
            )
    first = config.model_type == "mamba"
    if first and config.intermediate_size != int(config.expand * config.hidden_size):
        raise InputError(
            f"format mamba_ssm: intermediate_size is {config.intermediate_size}, and mamba_ssm's "
            f"is expand x d_model, {int(config.expand * config.hidden_size)}; use the format "
            "transformers"
        )
    names, default = (
        (MAMBA1, MambaConfig(hidden_size=config.hidden_size))
        if first
        else (MAMBA2, Mamba2Config(**MAMBA2_DEFAULTS))
    )
    differing = {
        key: value
        for key, name in names.items()
        if name is not None
        if _as_json(value := getattr(config, name)) != _as_json(getattr(default, name))
    }
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ({} if first else {"layer": "Mamba2"}) | differing,
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,  # vocab_size counts the rows that are there
        "tie_embeddings": config.tie_word_embeddings,
    }


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def map_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mamba_ssm's tensor names -> transformers'."""
    prefix = "backbone.embedding."
    return {
        f"backbone.embeddings.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: w
        for name, w in weights.items()
    }


def load(spec: ModelSpec) -> MambaForCausalLM | Mamba2ForCausalLM:
    """The model of a directory or hub id that mamba_ssm wrote, in fp32."""
    assert spec.model is not None
    config = map_config(loading.read_config(spec.model, spec.revision))
    model_class = MambaForCausalLM if isinstance(config, MambaConfig) else Mamba2ForCausalLM
    if spec.place == "meta":
        with spec.init_context():
            return model_class(config).eval()
    weights = map_names(read_weights(spec.model, spec.revision))
    tied, embeddings = weights.get("lm_head.weight"), weights.get("backbone.embeddings.weight")
    if config.tie_word_embeddings and embeddings is not None:
        if tied is not None and not torch.equal(tied, embeddings):
            raise InputError(
                f"model: {spec.model} says tie_embeddings but its lm_head.weight is not its "
                "embedding; set tie_embeddings to false in its config.json"
            )
        weights["lm_head.weight"] = embeddings
    with spec.init_context():
        model = model_class(config)
        own = model.state_dict()
        common_names = own.keys() & weights.keys()
        loading.check_names(
            spec.model,
            missing=own.keys() - weights.keys(),
            unexpected=weights.keys() - own.keys(),
            misshapen=[name for name in common_names if own[name].shape != weights[name].shape],
        )
        model.load_state_dict(weights)
    return model.eval()


def write(model: Any, directory: Path) -> None:
    """A Mamba of transformers' or of ours -> the files that mamba_ssm loads.

    It takes `pytorch_model.bin` and no other: a pickle, here of tensors alone, so that
    `torch.load(..., weights_only=True)` reads it. `model.safetensors` beside it holds the same.
    Raises InputError as `unmap_config`, RuntimeError if a file does not hold the weights.
    """
    config = unmap_config(model.config)
    weights = {
        name.replace("backbone.embeddings.", "backbone.embedding."): tensor.cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    # safetensors takes no tensor twice; the reader ties the head again.
    left_out = {"lm_head.weight"} if config["tie_embeddings"] else set()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    torch.save(weights, directory / "pytorch_model.bin")
    save_file(
        {name: tensor for name, tensor in weights.items() if name not in left_out},
        directory / "model.safetensors",
    )
    for file in loading.WEIGHT_FILES:
        held = read_file(directory / file)
        wrong = [
            name
            for name in held.keys() | (weights.keys() - left_out)
            if name not in held or not torch.equal(held[name], weights[name])
        ]
        if wrong:
            raise RuntimeError(f"{directory / file}: {wrong[0]} is not what the model holds")


def read_weights(model: str, revision: str | None) -> dict[str, Tensor]:
    """The tensors of model.safetensors or pytorch_model.bin; nothing else is unpickled."""
    for file in loading.WEIGHT_FILES:
        path = loading.fetch(model, file, revision)
        if path is not None:
            return read_file(path)
    raise InputError(f"model: {model} has none of the files {', '.join(loading.WEIGHT_FILES)}")


def read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"model: {path} cannot be read as weights: {reason}") from error
