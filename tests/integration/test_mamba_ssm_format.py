"""mamba_ssm's format, written: names and shapes of its own classes, its config.json, and files that
came out wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_tiny import VOCAB, make_stock
from torch import Tensor
from transformers import Mamba2Config, MambaConfig

from ssm_train.adapters import mamba_checkpoint
from ssm_train.adapters.base import ModelSpec

# Shapes of the parameters of mamba_ssm's own classes, for the sizes of peft_tiny.
LAYER = {
    "mamba": {
        "norm.weight": (32,),
        "mixer.A_log": (64, 8),
        "mixer.D": (64,),
        "mixer.in_proj.weight": (128, 32),
        "mixer.conv1d.weight": (64, 1, 4),
        "mixer.conv1d.bias": (64,),
        "mixer.x_proj.weight": (18, 64),
        "mixer.dt_proj.weight": (64, 2),
        "mixer.dt_proj.bias": (64,),
        "mixer.out_proj.weight": (32, 64),
    },
    "mamba2": {
        "norm.weight": (32,),
        "mixer.A_log": (4,),
        "mixer.D": (4,),
        "mixer.dt_bias": (4,),
        "mixer.in_proj.weight": (148, 32),
        "mixer.conv1d.weight": (80, 1, 4),
        "mixer.conv1d.bias": (80,),
        "mixer.norm.weight": (64,),
        "mixer.out_proj.weight": (32, 64),
    },
}
WIDE = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}
PUBLISHED = {
    "d_model": 768,
    "n_layer": 24,
    "vocab_size": 50280,
    "pad_vocab_size_multiple": 1,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "tie_embeddings": True,
}
"""As state-spaces/mamba-130m and mamba2-130m, but that the padded rows are counted."""
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mamba-130m": (MambaConfig(**WIDE), {"ssm_cfg": {}}),
    "more states": (MambaConfig(**WIDE, state_size=24), {"ssm_cfg": {"d_state": 24}}),
    "mamba, all options": (
        MambaConfig(
            **WIDE,
            state_size=5,
            conv_kernel=3,
            expand=3,
            time_step_rank=7,
            use_bias=True,
            use_conv_bias=False,
            residual_in_fp32=False,
            tie_word_embeddings=False,
        ),
        {
            "ssm_cfg": {
                "d_state": 5,
                "d_conv": 3,
                "expand": 3,
                "dt_rank": 7,
                "bias": True,
                "conv_bias": False,
            },
            "residual_in_fp32": False,
            "tie_embeddings": False,
        },
    ),
    "mamba2-130m": (
        Mamba2Config(**WIDE, n_groups=1, num_heads=24, tie_word_embeddings=True),
        {"ssm_cfg": {"layer": "Mamba2"}},
    ),
    "mamba2, all options": (
        Mamba2Config(
            **WIDE,
            n_groups=4,
            num_heads=48,
            head_dim=32,
            state_size=16,
            chunk_size=64,
            time_step_limit=(0.1, 0.5),
            use_bias=True,
            tie_word_embeddings=False,
        ),
        {
            "ssm_cfg": {
                "layer": "Mamba2",
                "d_state": 16,
                "headdim": 32,
                "ngroups": 4,
                "dt_limit": (0.1, 0.5),
                "bias": True,
                "chunk_size": 64,
            },
            "tie_embeddings": False,
        },
    ),
}


@pytest.mark.parametrize("family", LAYER)
@pytest.mark.parametrize("tied", [True, False])
def test_the_file_has_the_tensors_of_mamba_ssm_s_model(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """All of them, because its loader is strict, even the head that is the embedding."""
    mamba_checkpoint.write(make_stock(family, tie_word_embeddings=tied), tmp_path)
    written = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    rows = (VOCAB, 32)
    expected = {"backbone.embedding.weight": rows, "lm_head.weight": rows}
    expected |= {"backbone.norm_f.weight": (32,)}
    for i in (0, 1):
        expected |= {f"backbone.layers.{i}.{n}": shape for n, shape in LAYER[family].items()}
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == expected
    heads = {written[name].data_ptr() for name in ("backbone.embedding.weight", "lm_head.weight")}
    assert len(heads) == (1 if tied else 2)  # one storage: the head takes no room in the file
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == VOCAB and config["pad_vocab_size_multiple"] == 1

    again = mamba_checkpoint.load(ModelSpec(model=str(tmp_path))).state_dict()
    (tmp_path / "model.safetensors").unlink()
    from_pickle = mamba_checkpoint.load(ModelSpec(model=str(tmp_path))).state_dict()
    for name, tensor in make_stock(family, tie_word_embeddings=tied).state_dict().items():
        assert torch.equal(again[name], tensor) and torch.equal(from_pickle[name], tensor), name


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_is_mamba_ssm_s_and_comes_back(name: str) -> None:
    config, changes = CONFIGS[name]
    original = mamba_checkpoint.unmap_config(config)
    assert original == PUBLISHED | changes
    again = mamba_checkpoint.map_config(json.loads(json.dumps(original))).to_dict()
    for key, value in config.to_dict().items():
        if not key.endswith("_token_id"):  # mamba_ssm's format has none
            assert again[key] == value or list(again[key]) == list(value), key


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_file_of_mamba_ssm_that_came_out_wrong_is_found(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> dict[str, Tensor]:
        held = original(path)
        return {n: t for n, t in held.items() if path.name != file or "norm_f" not in n}

    original = mamba_checkpoint.read_file
    monkeypatch.setattr(mamba_checkpoint, "read_file", read)
    with pytest.raises(RuntimeError, match=f"{file}: backbone.norm_f.weight is not what"):
        mamba_checkpoint.write(make_stock("mamba"), tmp_path)
