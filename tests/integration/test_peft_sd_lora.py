"""SD_LORA against the equations: how many dimensions, which ones, and what they compute."""

import copy
from typing import Any

import pytest
import torch
from fla.ops.gla.naive import naive_recurrent_gla
from peft import get_peft_model
from peft_tiny import (
    logits_of,
    make_batch,
    make_stock,
    prepare,
    relative_error,
    token_losses,
    tokens,
    train_a_little,
)

from ssm_train.adapters import gla_mixer
from ssm_train.errors import InputError
from ssm_train.optim import OptimSettings, parameter_groups
from ssm_train.peft.dimensions import choose, divide
from ssm_train.peft.merge import merge_adapter
from ssm_train.peft.registration import CONFIGS
from ssm_train.peft.sd_lora import SdLoraSettings
from ssm_train.peft.sparse import DecayLayer, ProjectionLayer
from ssm_train.peft.spec import load_peft
from ssm_train.peft.tuner import own_layers

SMALL = {"peft_type": "SD_LORA", "num_freeze": {"channel": 0.5, "state": 0.5}, "proj_lora_r": 2}


def two_stages(family: str, **settings: Any) -> Any:
    """(prepared, method) after a made-up warm-up and training."""
    prepared = prepare(family)
    method: Any = load_peft(settings).make()
    method.inject(prepared)
    train_a_little(prepared.model, seed=7)
    method.begin_training(prepared, method.select(prepared.model))
    train_a_little(prepared.model)
    return prepared, method


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("share", "size", "trained"),
    [(0.99, 1536, 15), (0.99, 4096, 41), (0.99, 5120, 51), (0.75, 16, 4), (12, 16, 4), (0, 16, 16)],
)
def test_fractions_count_as_the_old_ones_did(share, size, trained):
    assert divide(size, share, 0, "channels").train == trained


def test_what_moved_most_trains_and_what_moved_least_is_zeroed():
    """Against a loop over a matrix."""
    moved = torch.rand(12, 5, generator=torch.Generator().manual_seed(0))
    choice = choose(moved, divide(12, 6, 2, "channels"), divide(5, 3, 0, "states"))
    rows = [sum(row) for row in moved.tolist()]
    by_score = sorted(range(12), key=lambda i: -rows[i])
    assert choice.channels.tolist() == sorted(by_score[:4])
    assert choice.zeroed.tolist() == sorted(by_score[-2:])
    for channel, states in zip(choice.channels.tolist(), choice.states.tolist(), strict=True):
        row = moved[channel].tolist()
        assert states == sorted(sorted(range(5), key=lambda i: -row[i])[:2])


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("zero", [0, 5])
def test_the_second_stage_is_the_base_with_moved_cells(zero):
    """Against a stock model whose dense weights were moved by a loop over the chosen cells; a
    zeroed channel has A = -inf there, whose decay factor is 0."""
    prepared, _ = two_stages(
        "mamba",
        **SMALL,
        num_zero={"channel": zero},
        target_modules=["A_log", "x_proj_B", "x_proj_C", "in_proj_x", "out_proj"],
        lora_targets=["out_proj"],
        finetune_parameters=["D", "dt_proj"],
        sdlora_alpha={"A_log": 2.0, "global": 0.5},
        proj_lora_alpha=6.0,
    )
    dense = make_stock("mamba")
    mixers = [layer.mixer for layer in dense.backbone.layers]
    first_row = {"x_proj_B": 2, "x_proj_C": 10}
    for layer in own_layers(prepared.model).values():
        mixer = mixers[int(layer.place.split(".")[2])]
        name = layer.place.rpartition(".")[2]
        values = {key: value.detach() for key, value in layer.values["default"].items()}
        choice = layer.choices["default"] if hasattr(layer, "choices") else {}
        if isinstance(layer, DecayLayer):
            for i, channel in enumerate(choice["channels"].tolist()):
                for j, state in enumerate(choice["states"][i].tolist()):
                    mixer.A_log.data[channel, state] += 0.5 * 2.0 * values["cells"][i, j]
            for channel in choice["zeroed"].tolist() if zero else []:
                mixer.A_log.data[channel] = torch.inf
        elif name in first_row:
            rows = slice(first_row[name], first_row[name] + 8)
            for i, channel in enumerate(choice["channels"].tolist()):
                mixer.x_proj.weight.data[rows, channel] += 0.5 * values["cells"][:, i]
        elif name == "in_proj_x":
            for i, channel in enumerate(choice["channels"].tolist()):
                mixer.in_proj.weight.data[channel] += 0.5 * values["cells"][i]
        elif name == "out_proj":
            mixer.out_proj.weight.data += 3 * values["lora_B"] @ values["lora_A"]
        elif name == "dt_proj":
            mixer.dt_proj.weight.data += values["weight"]
            mixer.dt_proj.bias.data += values["bias"]
        else:
            assert name == "skip"
            mixer.D.data += values["delta"]
    ids = tokens(2, 19)
    assert relative_error(logits_of(prepared.model, ids), logits_of(dense, ids)) < 1e-5


def test_the_warm_up_moves_all_of_A_log_and_drops_it_afterwards():
    prepared = prepare("mamba")
    method: Any = load_peft(SMALL).make()
    method.inject(prepared)
    trained = {n for n, p in prepared.model.named_parameters() if p.requires_grad}
    assert sum(name.endswith("log_decay.sd_lora_values.default.dense") for name in trained) == 2
    ids, before = tokens(2, 13), logits_of(prepare("mamba").model, tokens(2, 13))
    train_a_little(prepared.model, seed=7)
    assert relative_error(logits_of(prepared.model, ids), before) > 1e-3
    method.begin_training(prepared, method.select(prepared.model))
    assert relative_error(logits_of(prepared.model, ids), before) < 1e-5
    assert not any("dense" in name for name, _ in prepared.model.named_parameters())


def test_zeroed_key_channels_of_gla_have_only_their_own_step(monkeypatch):
    """Against fla's naive recurrence with gates of minus infinity."""
    prepared, _ = two_stages("gla", peft_type="GLA_SD_LORA", proj_lora_r=2)
    ids = tokens(2, 13)
    actual = logits_of(prepared.model, ids)

    def keep_keys(self: Any, q: Any, k: Any, v: Any, forgotten: Any) -> Any:
        self.closed = forgotten.view(k.shape[-2:])
        return k, torch.zeros_like(v)

    def naive(self: Any, q: Any, k: Any, v: Any, g: Any, *_: Any) -> Any:
        g = g.masked_fill(self.closed, -torch.inf)
        return naive_recurrent_gla(q, k, v, g, output_final_state=False)

    monkeypatch.setattr(gla_mixer.GatedLinearAttention, "_forget", keep_keys)
    monkeypatch.setattr(gla_mixer.GatedLinearAttention, "_recur", naive)
    assert relative_error(actual, logits_of(prepared.model, ids)) < 1e-5


def test_one_step_of_adam_is_that_on_the_chosen_cells_alone():
    """The gradient of a cell is the gradient of A_log there."""
    prepared, _ = two_stages("mamba", **SMALL)
    layers = [x for x in own_layers(prepared.model).values() if isinstance(x, DecayLayer)]
    for layer in layers:
        layer.owner.A_log.requires_grad_(True)
    token_losses(prepared.model.eval(), make_batch()).loss.backward()
    for layer in layers:
        choice = layer.choices["default"]
        expected = layer.owner.A_log.grad[choice["channels"][:, None], choice["states"]]
        assert relative_error(layer.values["default"]["cells"].grad, expected) < 1e-6


def test_dropout_is_on_the_input_of_A_while_training():
    prepared, _ = two_stages("mamba", **SMALL, proj_lora_dropout=0.5)
    layer = next(x for x in own_layers(prepared.model).values() if isinstance(x, ProjectionLayer))
    x = torch.randn(4, layer.base_layer.in_features)
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    actual = layer(x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    values = layer.values["default"]
    expected = layer.base_layer(x) + dropped @ values["lora_A"].T @ values["lora_B"].T
    assert relative_error(actual, expected) < 1e-6


def test_A_log_and_D_get_no_weight_decay_and_the_factors_do():
    prepared, _ = two_stages("mamba", **SMALL, finetune_parameters=["D"])
    groups = parameter_groups(
        prepared.model, OptimSettings(weight_decay=0.1), prepared.traits.no_decay
    )
    names = {id(p): name for name, p in prepared.model.named_parameters()}
    decayed = [names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]]
    assert any("lora_A" in name for name in decayed)
    assert not [name for name in decayed if "log_decay" in name or "skip" in name]


# ---------------------------------------------------------------- merging, several adapters


def test_merged_zeroed_channels_forget_in_the_stock_model():
    prepared, _ = two_stages("mamba", **SMALL, num_zero={"channel": 5})
    ids = tokens(2, 19)
    expected = logits_of(prepared.model, ids)
    merged = merge_adapter(prepared.model, prepared.traits)
    stock = make_stock("mamba")
    stock.load_state_dict(merged.model.state_dict())
    assert relative_error(logits_of(stock, ids), expected) < 1e-5


def test_merging_and_unmerging_gives_the_weights_back():
    prepared, _ = two_stages("mamba", **SMALL, num_zero={"channel": 5})
    before = copy.deepcopy(prepared.model.state_dict())
    prepared.model.merge_adapter()
    after = prepared.model.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("A_log" in name for name in moved) and any("x_proj_B" in name for name in moved)
    prepared.model.unmerge_adapter()
    for name, tensor in prepared.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


def test_two_adapters_merged_and_unmerged_give_the_weights_back():
    prepared, _ = two_stages("mamba", **SMALL, num_zero={"channel": 5})
    model, ids = prepared.model, tokens(1, 9)
    config = CONFIGS["SD_LORA"](**SMALL | {"stage": "warmup"}, task_type="CAUSAL_LM")
    model.add_adapter("second", config)
    before = logits_of(model, ids)
    A_log = {n: p.clone() for n, p in model.named_parameters() if n.endswith("A_log")}
    model.merge_adapter(["default", "second"])
    model.unmerge_adapter()
    for name, tensor in A_log.items():
        assert torch.equal(model.get_parameter(name), tensor)
    assert relative_error(logits_of(model, ids), before) < 1e-6


@pytest.mark.parametrize("peft_type", ["SD_LORA", "BITFIT", "ADDITIONAL_SCAN"])
def test_a_merged_adapter_switched_off_is_out_of_the_weights(peft_type):
    prepared, ids = prepare("mamba"), tokens(1, 9)
    before = logits_of(prepared.model, ids)
    settings = SMALL if peft_type == "SD_LORA" else {"peft_type": peft_type}
    method: Any = load_peft(settings).make()
    method.inject(prepared)
    train_a_little(prepared.model)
    trained = logits_of(prepared.model, ids)
    prepared.model.merge_adapter()
    assert relative_error(logits_of(prepared.model, ids), trained) < 1e-5
    with prepared.model.disable_adapter():
        assert relative_error(logits_of(prepared.model, ids), before) < 1e-5
    assert relative_error(logits_of(prepared.model, ids), trained) < 1e-5


def test_a_refused_merge_changes_nothing():
    prepared, _ = two_stages("gla", peft_type="GLA_SD_LORA", proj_lora_r=2)
    before = {n: p.clone() for n, p in prepared.model.named_parameters()}
    with pytest.raises(InputError, match="cannot be merged"):
        prepared.model.merge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in prepared.model.named_parameters())


@pytest.mark.parametrize("family", ["mamba", "gla"])
@pytest.mark.parametrize("own", ["sparse", "freeze"])
def test_a_bf16_model_computes_without_autocast_too(family, own):
    """As `ssm_train.load_run` gives it to a script."""
    settings = {
        "sparse": {"peft_type": "SD_LORA" if family == "mamba" else "GLA_SD_LORA"},
        "freeze": {
            "peft_type": "LAYER_FREEZE",
            "trainable_layers": {
                "mamba": ["in_proj", "conv1d", "dt_proj", "norm"],
                "gla": ["q_proj", "gk_proj", "embeddings"],
            }[family],
        },
    }[own]
    prepared = prepare(family, dtype=torch.bfloat16)
    method: Any = load_peft(
        settings | ({"num_freeze": {"channel": 0.5}} if own == "sparse" else {})
    )
    method = method.make()
    method.inject(prepared)
    train_a_little(prepared.model, seed=7)
    if own == "sparse":
        method.begin_training(prepared, method.select(prepared.model))
        train_a_little(prepared.model)
    ids = tokens(1, 9)
    plain = logits_of(prepared.model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(prepared.model, ids)
    exact = logits_of(copy.deepcopy(prepared.model).float(), ids)
    own_error = relative_error(expected, exact)
    assert 0 < relative_error(plain, exact) < 2 * own_error


@pytest.mark.parametrize("family", ["mamba", "gla"])
def test_step_sizes_and_gates_stay_fp32_without_autocast(family):
    name = {"mamba": "dt_proj", "gla": "gk_proj.1"}[family]
    prepared = prepare(family, dtype=torch.bfloat16)
    load_peft({"peft_type": "BITFIT", "target_modules": [name]}).make().inject(prepared)
    layer = next(x for x in own_layers(prepared.model).values())
    x = torch.randn(2, 3, layer.base_layer.in_features, dtype=torch.bfloat16)
    assert layer(x).dtype == layer.base_layer(x).dtype == torch.float32


def test_a_share_that_rounds_to_nothing_zeroes_nothing():
    prepared, _ = two_stages("gla", peft_type="GLA_SD_LORA", num_zero={"channel": 0.01})
    assert merge_adapter(prepared.model, prepared.traits).difference < 1e-6


def test_alpha_by_target_reaches_the_gate():
    prepared, _ = two_stages(
        "gla", peft_type="GLA_SD_LORA", sdlora_alpha={"gk_proj.1": 5.0, "global": 2.0}
    )
    layers = own_layers(prepared.model)
    gates = [layer for name, layer in layers.items() if name.endswith("gk_proj.1")]
    assert gates and all(layer.alpha("default") == 10 for layer in gates)


def test_an_untied_head_merges_on_its_own():
    prepared = prepare("mamba", tie_word_embeddings=True)
    method: Any = load_peft(SMALL | {"lora_targets": ["lm_head", "out_proj"]}).make()
    method.inject(prepared)
    train_a_little(prepared.model)
    assert merge_adapter(prepared.model, prepared.traits).difference < 1e-6


def test_gla_merges_unless_channels_are_zeroed():
    with pytest.raises(InputError, match="cannot be merged, because no weight"):
        prepared, _ = two_stages("gla", peft_type="GLA_SD_LORA", proj_lora_r=2)
        merge_adapter(prepared.model, prepared.traits)
    prepared, _ = two_stages("gla", peft_type="GLA_SD_LORA", num_zero={"channel": 0})
    assert merge_adapter(prepared.model, prepared.traits).difference < 1e-6


# ---------------------------------------------------------------- what is refused


def test_an_adapter_without_a_choice_does_not_compute():
    config = CONFIGS["SD_LORA"](num_freeze={"channel": 0.5}, task_type="CAUSAL_LM")
    model = get_peft_model(prepare("mamba").model, config)
    with pytest.raises(InputError, match="no dimensions are chosen yet; a warm-up .stage: warmup"):
        logits_of(model, tokens(1, 5))


def test_a_warm_up_that_moved_nothing_chooses_nothing():
    prepared = prepare("mamba")
    method: Any = load_peft(SMALL).make()
    method.inject(prepared)
    with pytest.raises(InputError, match="log_decay did not move in the warm-up; raise num_warm"):
        method.select(prepared.model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_freeze": {"channel": 0.9}, "num_zero": {"channel": 0.2}},
            "freeze 0.9, zero 0.2; low",
        ),
        ({"train_ratio": 0.6, "freeze_ratio": 0.5}, "more than 1 together: train 0.6, freeze 0.5"),
        (
            {"train_ratio": 0.2, "freeze_ratio": 0.5, "zero_ratio": 0.2},
            "are 0.2, 0.5 and 0.2, together 0.9 and not 1",
        ),
        ({"num_freeze": {"channel": 1.5}}, "a fraction is at most 1"),
        ({"train_ratio": 0.1, "num_freeze": {"channel": 32}}, "channel 32 is a number; give"),
        ({"proj_lora_r": None, "lora_targets": ["out_proj"]}, "lora_targets has no meaning with"),
        ({"sdlora_alpha": {"x_proj_A": 2.0}}, "'x_proj_A' is no target here; did you mean"),
        ({"num_zero": {"state": 1}}, "only whole channels are zeroed"),
        ({"target_modules": ["x_proj_B"]}, "A_log is missing, whose warm-up chooses; add it"),
        ({"num_warmup_it": -1}, "num_warmup_it is -1"),
        ({"num_freez": 1}, "unknown key 'num_freez' for peft_type SD_LORA; did you mean"),
        (
            {"target_modules": ["A_log", "in_proj"], "proj_lora_r": None},
            "the channels of in_proj are no rows or columns of it",
        ),
        ({"stage": "warmup"}, "a run goes through both stages by itself"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(InputError, match=message) as error:
        load_peft({"peft_type": "SD_LORA"} | settings).make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mamba", {"num_freeze": {"channel": 64}}, "of 64 channels 64 are frozen .* none is left"),
        ("mamba", {"num_freeze": {"state": 1.0}}, "of 8 states 8 are frozen"),
        ("mamba", {"lora_targets": ["q_proj"]}, "SD_LORA: 'q_proj' matches no module"),
        ("mamba", {"lora_targets": ["conv1d"]}, "conv1d is no linear layer"),
        (
            "mamba",
            {"lora_targets": ["x_proj"]},
            "x_proj_B is a slice of x_proj, which has LoRA",
        ),
        (
            "mamba",
            {"finetune_parameters": ["embeddings"]},
            "embeddings.weight is shared by two modules",
        ),
        (
            "mamba2",
            {"target_modules": ["A_log", "out_proj"], "proj_lora_r": None},
            "Mamba-2 chooses heads, which are no rows or columns of out_proj",
        ),
        ("mamba2", {}, "of 4 heads 4 are frozen"),
        ("mamba", {"finetune_parameters": ["E"]}, "finetune_parameters: 'E' is in no parameter"),
        ("mamba", {"finetune_parameters": ["A_log"]}, "'A_log' trains .*, which is a target"),
        ("mamba2", {"num_zero": {"channel": 1}, "num_freeze": {"channel": 1}}, "heads of Mamba-2"),
        ("gla", {}, "SD_LORA: gla models have no A_log to choose from; use GLA_SD_LORA"),
        ("mamba", {"peft_type": "GLA_SD_LORA"}, "mamba models have no gk_proj.1 .*; use SD_LORA"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(family, settings, message):
    method = load_peft({"peft_type": "SD_LORA"} | settings).make()
    with pytest.raises(InputError, match=message) as error:
        method.inject(prepare(family))
    assert "\n" not in str(error.value)


def test_a_missing_count_keeps_its_default():
    settings = SdLoraSettings.model_validate({"num_freeze": {"state": 0.5}})
    assert (settings.num_freeze.channel, settings.num_freeze.state) == (0.99, 0.5)


def test_the_old_variable_turns_a_lora_config_into_the_part_on_the_projections():
    written = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["out_proj"]}
    spec = load_peft(written | {"lora_dropout": 0.2}, {"peft_type": "sdlora", "train_ratio": 0.01})
    settings = spec.settings
    assert spec.peft_type == "SD_LORA" and isinstance(settings, SdLoraSettings)
    assert (settings.proj_lora_r, settings.lora_scale, settings.proj_lora_dropout) == (4, 2, 0.2)
    assert settings.lora_names == ["out_proj"]
    assert divide(1536, settings.frozen_channels, settings.zeroed_channels, "").train == 15
    gla = load_peft(written | {"target_modules": ["attn.q_proj"]}, {"peft_type": "sdlora", "r": 2})
    assert gla.peft_type == "GLA_SD_LORA" and gla.settings.proj_lora_r == 2
