"""Merged weights as files: no small update is lost, the libraries' own models compute the same, and
what one of them would not load whole is not written."""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_tiny import (
    inject,
    logits_of,
    make_batch,
    make_rounded_stock,
    make_stock,
    prepare,
    relative_error,
    tokens,
    train_a_little,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssm_train.adapters import common, mamba_checkpoint
from ssm_train.adapters.base import ModelSpec, Prepared
from ssm_train.adapters.registry import adopt
from ssm_train.errors import InputError
from ssm_train.peft import merge
from ssm_train.peft.lora import lora_layers
from ssm_train.peft.merge import FileFormat, merge_adapter, write_merged
from ssm_train.peft.spec import load_peft

SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "lora_ga": {"init_lora_weights": "lora_ga", "rank_pattern": {"dt_proj": 1}},
    "conv1d": {"target_modules": ["in_proj"], "modules_to_save": ["conv1d"]},
    "head": {"target_modules": ["lm_head"], "use_dora": True, "use_rslora": True},
    "head_in_full": {"target_modules": ["in_proj"], "modules_to_save": ["lm_head"]},
}
UNTIED = ("head", "head_in_full")
TARGET = {"gla": "q_proj"}  # where in_proj does not exist
CELLS: list[tuple[str, str, FileFormat]] = [
    (name, family, file_format)
    for name in SETTINGS
    for family, formats in {
        "mamba": ("transformers", "mamba_ssm"),
        "mamba2": ("transformers", "mamba_ssm"),
        "gla": ("transformers",),
    }.items()
    for file_format in formats
    if (name, family) != ("conv1d", "gla")
]


def adapted(family: str, settings: dict[str, Any]) -> Prepared:
    """A tied model with an adapter that moves its logits."""
    prepared = prepare(family, tie_word_embeddings=True)
    before = logits_of(prepared.model, tokens(2, 13))
    if "target_modules" in settings:
        renamed = {"in_proj": TARGET.get(family, "in_proj")}
        targets = [renamed.get(target, target) for target in settings["target_modules"]]
        settings = settings | {"target_modules": targets}
    if family != "mamba":
        settings = {key: value for key, value in settings.items() if key != "rank_pattern"}
    method = inject(prepared, **settings)
    examples = (make_batch(1, 9 + k % 5, seed=20 + k) for k in count())
    method.calibrate(prepared, examples, common.token_losses)
    train_a_little(prepared.model)
    assert relative_error(logits_of(prepared.model, tokens(2, 13)), before) > 1e-2
    return prepared


def load_stock(family: str, directory: Path, file_format: FileFormat, tied: bool) -> nn.Module:
    """The library's model from the files, without our reader."""
    if file_format == "transformers":
        return type(make_stock(family)).from_pretrained(directory).eval()
    weights = torch.load(directory / "pytorch_model.bin", weights_only=True)
    stock = make_stock(family, seed=9, tie_word_embeddings=tied)
    weights["backbone.embeddings.weight"] = weights.pop("backbone.embedding.weight")
    stock.load_state_dict(weights)
    return stock


@pytest.mark.parametrize(("name", "family", "file_format"), CELLS)
def test_the_library_s_own_model_computes_base_plus_adapter(
    name: str, family: str, file_format: FileFormat, tmp_path: Path
) -> None:
    prepared, ids = adapted(family, SETTINGS[name]), tokens(2, 13)
    expected = logits_of(prepared.model, ids)
    merged = merge_adapter(prepared.model, prepared.traits)
    write_merged(merged, tmp_path, base_id="someone/base", file_format=file_format)
    stock = load_stock(family, tmp_path, file_format, tied=name not in UNTIED)
    if family == "gla":
        adopt(stock)  # fla's kernels need a GPU
    assert relative_error(logits_of(stock, ids), expected) < 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    tied = config["tie_embeddings" if file_format == "mamba_ssm" else "tie_word_embeddings"]
    assert tied == (name not in UNTIED)
    card = (tmp_path / "README.md").read_text()
    assert f"by {merged.difference:.1e} of" in card and "weights in float32" in card
    assert f"library_name: {file_format.replace('_', '-')}\n" in card


def test_an_update_that_bf16_would_lose(tmp_path: Path) -> None:
    """From a bf16 base, W + s B A within 1e-2 of the update; rounded to bf16 it would be gone."""
    prepared = prepare("mamba", dtype=torch.bfloat16)
    inject(prepared)
    train_a_little(prepared.model, scale=1e-4)
    updates = {}
    for name, layer in lora_layers(prepared.model).items():
        A, B = (getattr(layer, f"lora_{f}")["default"].weight.detach().double() for f in "AB")
        updates[f"{name.removeprefix('base_model.model.')}.weight"] = 2 * B @ A  # alpha 8, r 4
    updates = {name: u * (2 if "dt_proj" in name else 1) for name, u in updates.items()}  # r 2
    merged = merge_adapter(prepared.model, prepared.traits)
    write_merged(merged, tmp_path, base_id="someone/base")
    written = load_file(tmp_path / "model.safetensors")
    base = make_rounded_stock("mamba").state_dict()
    assert len(updates) == 8
    for name, update in updates.items():
        W = base[name].double()
        assert written[name].dtype == torch.float32
        assert distance(written[name] - W, update) < 1e-2, name
        assert distance((W + update).bfloat16() - W, update) > 0.5, name


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# ---------------------------------------------------------------- refused, or found afterwards


@pytest.mark.parametrize("family", ["mamba", "gla"])
def test_a_bias_without_a_place_in_the_model_is_not_written(family: str, tmp_path: Path) -> None:
    """transformers would load the rest, and report the bias as unexpected."""
    prepared = prepare(family)
    target = TARGET.get(family, "in_proj")
    spec = load_peft({"peft_type": "BITFIT", "target_modules": [target]})
    assert spec is not None
    spec.make().inject(prepared)
    merged = merge_adapter(prepared.model, prepared.traits)
    with pytest.raises(InputError, match=f"has no place for .*{target}.bias and 1 more; keep"):
        write_merged(merged, tmp_path / "merged", base_id="someone/base")
    assert not (tmp_path / "merged").exists()


def spoil_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.1}))


def spoil_weights(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["backbone.norm_f.weight"][3] += 1e-6
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(spoil_config, "the files' logits differ by"), (spoil_weights, "norm_f.weight is not what")],
)
def test_files_that_do_not_hold_the_model_are_found(
    spoil: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = merge.save_model
    monkeypatch.setattr(merge, "save_model", lambda model, to: (save(model, to), spoil(to)))
    prepared = prepare("mamba")
    inject(prepared)
    merged = merge_adapter(prepared.model, prepared.traits)
    with pytest.raises(RuntimeError, match=words):
        write_merged(merged, tmp_path, base_id="someone/base")


# ---------------------------------------------------------------- mamba_ssm's format


def test_states_that_an_adapter_added_are_counted(tmp_path: Path) -> None:
    prepared, ids = prepare("mamba"), tokens(2, 13)
    spec = load_peft({"peft_type": "ADDITIONAL_SCAN", "num_states": 3})
    assert spec is not None
    spec.make().inject(prepared)
    train_a_little(prepared.model)
    expected = logits_of(prepared.model, ids)
    merged = merge_adapter(prepared.model, prepared.traits)
    write_merged(merged, tmp_path, base_id="someone/base", file_format="mamba_ssm")
    assert json.loads((tmp_path / "config.json").read_text())["ssm_cfg"] == {"d_state": 11}
    loaded = mamba_checkpoint.load(ModelSpec(model=str(tmp_path)))
    assert relative_error(logits_of(loaded, ids), expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("gla", {}, "Mamba-1 and Mamba-2, and this model is gla; use the format transformers"),
        ("bamba", {}, "and this model is bamba"),
        ("mamba", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, and mamba_ssm"),
        ("mamba", {"intermediate_size": 48}, "intermediate_size is 48, and mamba_ssm's is expand"),
        ("mamba2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and mamba_ssm computes with 's"),
    ],
)
def test_what_mamba_ssm_does_not_compute_is_refused(
    family: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    prepared = prepare(family, **options)
    inject(prepared)
    merged = merge_adapter(prepared.model, prepared.traits)
    with pytest.raises(InputError, match=words):
        write_merged(merged, tmp_path / "m", base_id="someone/base", file_format="mamba_ssm")
    assert not (tmp_path / "m").exists()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("mamba_ssm") is None,
    reason="needs a CUDA device and mamba_ssm",
)
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("name", ["dora", "head"])
def test_mamba_ssm_s_own_loader_and_kernels(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.modules import mamba2

    # The CUDA convolution, where it is installed, wants widths that are multiples of 8.
    monkeypatch.setattr(mamba2, "causal_conv1d_fn", None)
    prepared, ids = adapted(family, SETTINGS[name]), tokens(2, 13)
    expected = logits_of(prepared.model, ids)
    merged = merge_adapter(prepared.model, prepared.traits)
    write_merged(merged, tmp_path, base_id="someone/base", file_format="mamba_ssm")
    if family == "mamba2":  # the other path has no other convolution
        config = json.loads((tmp_path / "config.json").read_text())
        config["ssm_cfg"]["use_mem_eff_path"] = False
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = MambaLMHeadModel.from_pretrained(str(tmp_path), device="cuda")
    with torch.no_grad():
        logits = model.eval()(ids.cuda()).logits.cpu()
    assert distance(logits, expected) < 2e-3
