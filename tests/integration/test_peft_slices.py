"""LoRA on slices of a projection: the same function, one block of rows of the weight trains, the
export loads onto the whole layer, merging makes it whole again."""

import json

import pytest
import torch
from peft import PeftModel
from peft_tiny import (
    logits_of,
    make_batch,
    make_stock,
    prepare,
    relative_error,
    tokens,
    train_a_little,
)

from ssm_train.adapters import common
from ssm_train.adapters.slices import SlicedLinear, cut_slices, join_slices, slice_names
from ssm_train.errors import InputError
from ssm_train.health.liveness import check_liveness
from ssm_train.peft.export import export_adapter, load_adapter
from ssm_train.peft.merge import merge_adapter
from ssm_train.peft.spec import load_peft

# slice -> (family, its layer, its rows in the tiny model: d = 64, dt_rank = 2, n = 8, 4 heads)
SLICES = {
    ("mamba", "in_proj_x"): ("in_proj", 0, 64),
    ("mamba", "in_proj_z"): ("in_proj", 64, 128),
    ("mamba", "x_proj_dt"): ("x_proj", 0, 2),
    ("mamba", "x_proj_B"): ("x_proj", 2, 10),
    ("mamba", "x_proj_C"): ("x_proj", 10, 18),
    ("mamba2", "in_proj_z"): ("in_proj", 0, 64),
    ("mamba2", "in_proj_x"): ("in_proj", 64, 128),
    ("mamba2", "in_proj_B"): ("in_proj", 128, 136),
    ("mamba2", "in_proj_C"): ("in_proj", 136, 144),
    ("mamba2", "in_proj_dt"): ("in_proj", 144, 148),
    ("bamba", "in_proj_x"): ("in_proj", 64, 128),
}
each_slice = pytest.mark.parametrize(("family", "name"), SLICES)


def inject(prepared, targets, **settings):
    method = load_peft({"peft_type": "LORA", "r": 2, "target_modules": targets} | settings).make()
    method.inject(prepared)
    return method


@each_slice
def test_only_its_rows_of_the_weight_change(family, name):
    prepared, ids = prepare(family), tokens(2, 13)
    before = logits_of(prepared.model, ids)
    weights = {k: v.clone() for k, v in prepared.model.state_dict().items()}
    inject(prepared, [name])
    assert relative_error(logits_of(prepared.model, ids), before) < 1e-5
    check_liveness(prepared.model, make_batch(), common.token_losses)
    train_a_little(prepared.model)
    trained = logits_of(prepared.model, ids)
    merged = merge_adapter(prepared.model, prepared.traits).model
    assert relative_error(logits_of(merged, ids), trained) < 1e-5
    after = merged.state_dict()
    assert after.keys() == weights.keys()
    layer, first, last = SLICES[family, name]
    for key, weight in weights.items():
        if not key.endswith(f"{layer}.weight"):
            assert torch.equal(after[key], weight), key
            continue
        changed = (after[key] != weight).any(1).nonzero().flatten().tolist()
        assert changed == list(range(first, last)), key


@each_slice
def test_export_and_reload_on_the_stock_base(family, name, tmp_path):
    prepared, ids = prepare(family), tokens(2, 13)
    inject(prepared, [name, "out_proj"])
    train_a_little(prepared.model)
    export_adapter(prepared.model, tmp_path, base_id=None, traits=prepared.traits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SSM_LORA"
    expected = logits_of(prepared.model, ids)
    for loaded in (
        load_adapter(make_stock(family), tmp_path),
        PeftModel.from_pretrained(make_stock(family), str(tmp_path)),
    ):
        assert torch.equal(logits_of(loaded, ids), expected)
    whole = loaded.unload()
    assert not any(isinstance(m, SlicedLinear) for m in whole.modules())
    assert whole.state_dict().keys() == make_stock(family).state_dict().keys()


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_every_variant_of_lora_works_on_slices(settings, tmp_path):
    prepared, ids = prepare("mamba"), tokens(2, 13)
    before = logits_of(prepared.model, ids)
    targets = ["in_proj_x", "x_proj_B", "x_proj_C"]
    method = inject(prepared, targets, **settings)
    assert relative_error(logits_of(prepared.model, ids), before) < 1e-5
    train_a_little(prepared.model)
    export_adapter(
        prepared.model, tmp_path, base_id=None, traits=prepared.traits, initial=method.initial
    )
    loaded = load_adapter(make_stock("mamba"), tmp_path)
    assert relative_error(logits_of(loaded, ids), logits_of(prepared.model, ids)) < 1e-5


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba"])
@pytest.mark.parametrize("bias", [False, True])
def test_cutting_and_joining_is_exact(family, bias):
    options = {} if family == "bamba" else {"use_bias": bias}
    model, ids = prepare(family, **options).model, tokens(2, 13)
    before, state = logits_of(model, ids), model.state_dict()
    cut_slices(model, lambda name: name.rpartition(".")[2] in slice_names(model))
    assert model.state_dict().keys() != state.keys()
    assert relative_error(logits_of(model, ids), before) < 1e-6
    join_slices(model)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("mamba", ["in_proj", "in_proj_x"], "'in_proj_x' is a slice of in_proj, which is a target"),
        ("mamba", ["x_proj_D"], "'x_proj_D' matches no module; did you mean .*'x_proj_"),
        ("gla", ["in_proj_x"], "'in_proj_x' matches no module"),
        (
            "mamba",
            {"targets": ["in_proj_x"], "modules_to_save": ["in_proj"]},
            "modules_to_save: .*in_proj cannot train in full while LoRA sits on a slice",
        ),
    ],
)
def test_bad_slices_are_one_line(family, targets, message):
    more = dict(targets) if isinstance(targets, dict) else {"targets": targets}
    with pytest.raises(InputError, match=message) as error:
        inject(prepare(family), **more)
    assert "\n" not in str(error.value)


def test_an_excluded_layer_keeps_its_slices():
    prepared = prepare("mamba")
    inject(prepared, ["in_proj_x"], exclude_modules=["layers.0.mixer.in_proj"])
    cut = [n for n, m in prepared.model.named_modules() if isinstance(m, SlicedLinear)]
    assert len(cut) == 1 and "layers.1" in cut[0]


@pytest.mark.parametrize("target", ["in_proj_x", "in_proj.in_proj_z"])
def test_a_bias_that_bitfit_gave_to_a_slice_is_kept(target):
    prepared, ids = prepare("mamba"), tokens(1, 9)
    method = load_peft({"peft_type": "BITFIT", "target_modules": [target]}).make()
    method.inject(prepared)
    train_a_little(prepared.model)
    expected = logits_of(prepared.model, ids)
    merged = prepared.model.merge_and_unload()
    assert not any(isinstance(m, SlicedLinear) for m in merged.modules())
    assert relative_error(logits_of(merged, ids), expected) < 1e-5


@pytest.mark.parametrize("entry", ["in_proj_x.weight", "in_proj.in_proj_x", "x_proj_B"])
def test_layer_freeze_trains_slices(entry):
    prepared, ids = prepare("mamba"), tokens(1, 9)
    before = logits_of(prepared.model, ids)
    method = load_peft({"peft_type": "LAYER_FREEZE", "trainable_layers": [entry]}).make()
    method.inject(prepared)
    assert relative_error(logits_of(prepared.model, ids), before) < 1e-5
    check_liveness(prepared.model, make_batch(), common.token_losses)


def test_a_second_adapter_on_a_cut_layer_s_whole_is_refused():
    prepared = prepare("mamba")
    inject(prepared, ["in_proj"])
    config = prepared.model.peft_config["default"]
    other = type(config)(target_modules=["in_proj_x"], task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="in_proj has an adapter already"):
        prepared.model.add_adapter("second", other)
