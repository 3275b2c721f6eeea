"""What is tuned for a run: a step of its shapes, on a model that nothing was loaded for."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ssm_train import warmup
from ssm_train.adapters.registry import FAMILIES
from ssm_train.config import RunConfig, load_config
from ssm_train.errors import InputError
from ssm_train.kernels import choices, tuning

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "vocab_size": 61}


def config(**values: Any) -> RunConfig:
    model = {"model_type": "gla", "num_hidden_layers": 24} | SMALL
    given = {"data": "random_8", "new_model": model, "prec": "fp32", "max_length": 9} | values
    return RunConfig(**given)


def test_a_new_model_keeps_its_sizes_and_few_layers() -> None:
    cfg = config(tokenizer={"type": "word"})
    shape = warmup.shape_of(cfg)
    assert cfg.new_model is not None
    assert shape.new_model == cfg.new_model | {"num_hidden_layers": 2}
    assert warmup.shape_of(config(new_model={"model_type": "gla"})).new_model == {
        "model_type": "gla", "num_hidden_layers": 2, "vocab_size": 32_000
    }  # fmt: skip


def test_a_peft_config_that_names_layers_has_them() -> None:
    peft = {"peft_type": "LAYER_FREEZE", "trainable_layers": ["layers.20"]}
    new_model = warmup.shape_of(config(peft=peft)).new_model
    assert new_model is not None and new_model["num_hidden_layers"] == 24


@pytest.mark.parametrize("family", ["gla", "mamba", "mamba2", "mamba_ssm"])
def test_a_checkpoint_lends_its_sizes(family: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "vocab_size": 96}
    if family == "mamba_ssm":
        original = {"d_model": 64, "n_layer": 9, "vocab_size": 96, "ssm_cfg": {"layer": "Mamba1"}}
        (tmp_path / "config.json").write_text(json.dumps(original), encoding="utf-8")
    else:
        adapter, _ = FAMILIES[family]()
        own = {"num_heads": 4, "head_dim": 32, "n_groups": 1} if family == "mamba2" else {}
        values = sizes | {"num_hidden_layers": 9} | own
        make = getattr(adapter, "config_class", partial(AutoConfig.for_model, family))
        make(**values).save_pretrained(tmp_path)
    shape = warmup.shape_of(config(model=str(tmp_path), new_model=None))
    assert shape.model is None and shape.new_model is not None
    assert shape.new_model.items() >= (sizes | {"num_hidden_layers": 2}).items()
    assert shape.new_model["model_type"] == family.removesuffix("_ssm")
    warmup.run_step(shape, CPU, nullcontext())


def test_a_run_config_lends_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cfg, _ = load_config("cfg/quickstart/gla_lora.yaml")
    base, _ = load_config("cfg/quickstart/gla_base.yaml")
    new_model = warmup.shape_of(cfg).new_model
    assert new_model is not None and base.new_model is not None
    assert new_model.items() >= base.new_model.items()


def test_batches_have_the_run_s_shape() -> None:
    packed = warmup.make_batch(config(packing=True, tokens_per_batch=70, max_length=16), 61)
    assert packed.input_ids.shape == (1, 70) and packed.cu_seqlens is not None
    assert packed.cu_seqlens.tolist() == [0, 16, 32, 48, 64, 70]
    rows = warmup.make_batch(config(batch_size=3, max_length=None), 61)
    assert rows.input_ids.shape == (3, 512) and rows.cu_seqlens is None
    assert int(rows.input_ids.max()) < 61
    long = warmup.make_batch(config(packing=True, tokens_per_batch=70, max_length=None), 61)
    assert long.cu_seqlens is not None and long.cu_seqlens.tolist() == [0, 70]


@pytest.mark.parametrize("peft", [None, {"peft_type": "LORA", "layers_to_transform": [20]}])
def test_a_step_trains_what_the_run_trains(peft: dict[str, Any] | None) -> None:
    cfg = warmup.shape_of(config(peft=peft, packing=True, tokens_per_batch=40, max_length=16))
    _, prepared = warmup.build_model(cfg, "cpu")
    trained = {name for name, p in prepared.model.named_parameters() if p.requires_grad}
    assert trained and all(("lora_" in name) == (peft is not None) for name in trained)
    warmup.run_step(cfg, CPU, nullcontext())


@pytest.mark.slow
def test_the_shipped_configs_need_nothing_but_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    paths = sorted(Path("cfg/warmup").glob("*.yaml"))
    assert len(paths) == 3
    for path in paths:
        cfg, _ = load_config(path)
        shape = warmup.shape_of(cfg)
        assert shape.new_model is not None
        small = SMALL
        if shape.new_model["model_type"] == "mamba2":
            small = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "vocab_size": 61}
        changes = {"new_model": shape.new_model | small, "tokens_per_batch": 600, "batch_size": 1}
        warmup.run_step(shape.model_copy(update=changes), CPU, nullcontext())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> choices.Gpu:
    """As if there were one; the step runs on the CPU, where nothing is tuned."""
    gpu = choices.Gpu("Toy GPU", "9.0")
    accelerator = SimpleNamespace(device=CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(warmup.distributed, "build_accelerator", lambda *_: accelerator)
    monkeypatch.setattr(choices.Gpu, "at", classmethod(lambda *_: gpu))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return gpu


def test_choices_are_written_where_runs_look(
    gpu: choices.Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = {"fla.kernel": {(64, True): {"kwargs": {"BK": 32}, "num_warps": 4}}}
    monkeypatch.setattr(tuning, "collect", lambda: chosen)
    assert warmup.tune(config(), 1, None) == gpu.user_file
    found, sources = choices.load(gpu)
    assert found["fla.kernel"] == chosen["fla.kernel"]
    assert sources[0] == str(gpu.user_file)
    assert choices.read(warmup.tune(config(), 1, tmp_path / "other.json")) == chosen


def test_rows_of_auto_are_settled_first(
    gpu: choices.Gpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[int] = []
    monkeypatch.setattr(warmup, "run_step", lambda cfg, *_: rows.append(cfg.row_tokens))
    monkeypatch.setattr(tuning, "collect", lambda: {"fla.kernel": {}})
    warmup.tune(config(packing=True, tokens_per_batch="auto"), 1, None)
    assert rows == [16_384]
    assert "tokens_per_batch auto: 16,384 tokens, as the device is cpu" in capsys.readouterr().out


def test_longer_rows_leave_room_for_fewer_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "free_memory", lambda device: 62 * 2**30)
    monkeypatch.setattr(warmup.os, "sched_getaffinity", lambda _: range(64))
    assert warmup.count_processes(config(), CPU) == 12
    assert warmup.count_processes(config(packing=True, tokens_per_batch=65_536), CPU) == 3
    assert warmup.count_processes(config(packing=True, tokens_per_batch=10**6), CPU) == 1


def test_nothing_to_tune_is_said(gpu: choices.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "collect", dict)
    with pytest.raises(InputError, match="no kernels to tune"):
        warmup.tune(config(), 1, None)
    assert not gpu.user_file.exists()


@pytest.mark.slow
def test_processes_that_fail_are_counted() -> None:
    """Here for want of a GPU, or of the device that the config names."""
    if torch.cuda.is_available():
        pytest.skip("needs a process without a GPU")
    cfg = warmup.shape_of(config(device="cuda"))
    assert warmup.compile_side_by_side(cfg, 2) == 2
