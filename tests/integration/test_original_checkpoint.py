"""Checkpoints in mamba_ssm's own layout, written here, load as the equal transformers model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ssm_train.adapters import registry
from ssm_train.adapters.base import ModelSpec
from ssm_train.errors import InputError

BASE = {
    "d_model": 24,
    "n_layer": 2,
    "vocab_size": 59,  # 64 with padding
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
CASES = {
    "mamba": ("mamba", {}, {}),
    "mamba, all options": (
        "mamba",
        {
            "ssm_cfg": {"layer": "Mamba1", "d_state": 5, "d_conv": 3, "dt_rank": 3, "bias": True},
            "tie_embeddings": False,
        },
        {
            "state_size": 5,
            "conv_kernel": 3,
            "time_step_rank": 3,
            "use_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "mamba2": (
        "mamba2",
        {"ssm_cfg": {"layer": "Mamba2", "headdim": 8}, "tie_embeddings": True},
        {"state_size": 128, "n_groups": 1, "tie_word_embeddings": True},
    ),
    "mamba2, all options": (
        "mamba2",
        {
            "ssm_cfg": {
                "layer": "Mamba2",
                "headdim": 4,
                "ngroups": 3,
                "d_state": 6,
                "expand": 1,
                "dt_limit": [0.2, 0.8],
                "conv_bias": False,
                "chunk_size": 4,
            },
        },
        {
            "head_dim": 4,
            "num_heads": 6,
            "n_groups": 3,
            "state_size": 6,
            "expand": 1,
            "time_step_limit": (0.2, 0.8),
            "use_conv_bias": False,
            "tie_word_embeddings": True,
        },
    ),
}


def write_original(directory: Path, stock: Any, config: dict[str, Any], file: str) -> None:
    """The files that MambaLMHeadModel.save_pretrained of mamba_ssm writes, for a stock model."""
    weights = {
        name.replace("backbone.embeddings.", "backbone.embedding."): tensor.clone()
        for name, tensor in stock.state_dict().items()
    }
    (directory / "config.json").write_text(json.dumps(BASE | config))
    if file.endswith(".bin"):
        torch.save(weights, directory / file)
    else:
        save_file(weights, directory / file)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_equal_transformers_model(
    tiny_stock_model: Callable[..., Any],
    write_tokenizer: Callable[..., None],
    tmp_path: Path,
    case: str,
    file: str,
) -> None:
    family, config, changes = CASES[case]
    defaults = {"vocab_size": 64} | ({"state_size": 16} if family == "mamba" else {})
    stock = tiny_stock_model(family, **defaults | changes).eval()
    write_original(tmp_path, stock, config, file)
    write_tokenizer(tmp_path)
    spec = ModelSpec(model=str(tmp_path))
    adapter, reason = registry.resolve(spec)
    assert adapter.name == family and "mamba_ssm" in reason
    model = adapter.prepare(spec).model.eval()
    ids = torch.arange(3, 16)[None]
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path / "as_transformers")
    again = type(stock).from_pretrained(tmp_path / "as_transformers").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2}}, "attn_layer_idx = \\[1\\]"),
        ({"d_intermediate": 64}, "d_intermediate = 64"),
        ({"rms_norm": False}, "rms_norm = False"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "ssm_cfg.norm_before_gate"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 8}}, "ssm_cfg.d_ssm = 8"),
        ({"ssm_cfg": {"d_stat": 8}}, "unknown ssm_cfg.d_stat; did you mean 'd_state'"),
        ({"n_layer": 3}, "missing .backbone.layers.2"),
        ({"n_layer": 1}, "unexpected .backbone.layers.1"),
        ({"vocab_size": 70}, "of another shape .backbone.embeddings.weight"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_name(
    tiny_stock_model: Callable[..., Any],
    write_tokenizer: Callable[..., None],
    tmp_path: Path,
    config: dict[str, Any],
    words: str,
) -> None:
    stock = tiny_stock_model("mamba", vocab_size=64, state_size=16)
    write_original(tmp_path, stock, config, "pytorch_model.bin")
    write_tokenizer(tmp_path)
    spec = ModelSpec(model=str(tmp_path))
    with pytest.raises(InputError, match=words):
        registry.resolve(spec)[0].prepare(spec)


def test_a_pickle_that_runs_code_is_not_run(
    write_tokenizer: Callable[..., None], tmp_path: Path
) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "config.json").write_text(json.dumps(BASE))
    torch.save({"backbone.embedding.weight": Malicious()}, tmp_path / "pytorch_model.bin")
    write_tokenizer(tmp_path)
    spec = ModelSpec(model=str(tmp_path))
    with pytest.raises(InputError, match="pytorch_model.bin"):
        registry.resolve(spec)[0].prepare(spec)
    assert not (tmp_path / "ran").exists()
