"""Our own methods as PEFT methods: what trains, left padding, plain PEFT, several adapters on one
base, equations, what is refused. The support matrix has the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matrix.cell import inject as inject_method
from matrix.methods import OWN
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft_tiny import (
    logits_of,
    make_batch,
    make_rounded_stock,
    make_stock,
    prepare,
    relative_error,
    token_losses,
    tokens,
    train_a_little,
)

from ssm_train.adapters.registry import adopt
from ssm_train.errors import InputError
from ssm_train.peft.coverage import measure_coverage
from ssm_train.peft.export import export_adapter
from ssm_train.peft.registration import CONFIGS
from ssm_train.peft.spec import load_peft

CELLS = [(name, family) for name, method in OWN.items() for family in method.families]
# Methods whose scan adds up the same numbers in another order.
REORDERED = ("transform_channels", "transform_rank", "more_states", "sd_lora")
# Methods that are another function than the base wherever their values begin.
NEVER_THE_BASE = ("affix",)
each_cell = pytest.mark.parametrize(("name", "family"), CELLS)


def settings_of(name: str, family: str) -> dict[str, Any]:
    settings = OWN[name].settings_of(family)
    assert settings is not None
    return settings


def inject(prepared: Any, settings: dict[str, Any]) -> Any:
    return inject_method(prepared, settings, token_losses)


def trained(name: str, family: str, **options: Any) -> Any:
    prepared = prepare(family, **options)
    inject(prepared, settings_of(name, family))
    train_a_little(prepared.model)
    return prepared


@each_cell
def test_only_its_values_train_and_step_0_is_the_base_s(name: str, family: str) -> None:
    """To the bit, where the same sums are computed."""
    prepared, ids = prepare(family), tokens(2, 19)
    before = logits_of(prepared.model, ids)
    inject(prepared, settings_of(name, family))
    for parameter_name, parameter in prepared.model.named_parameters():
        assert parameter.requires_grad == ("values" in parameter_name), parameter_name
    if OWN[name].unchanged and name not in REORDERED:
        assert torch.equal(logits_of(prepared.model, ids), before)
    train_a_little(prepared.model)
    assert relative_error(logits_of(prepared.model, ids), before) > 1e-3
    with prepared.model.disable_adapter():
        assert relative_error(logits_of(prepared.model, ids), before) < 1e-6


@pytest.mark.parametrize(("name", "family"), [c for c in CELLS if c[1] == "bamba"])
def test_bf16_bases_stay_within_twice_their_own_error(name: str, family: str) -> None:
    """The error of bf16 arithmetic with the method is at most twice that without it."""
    full, ids = trained(name, family), tokens(2, 19)
    rounded = make_rounded_stock(family)
    adopt(rounded)
    bf16 = prepare(family, dtype=torch.bfloat16)
    own_error = relative_error(logits_autocast(bf16.model, ids), logits_of(rounded, ids))
    values = get_peft_model_state_dict(full.model)
    fp32 = SimpleNamespace(model=rounded)
    for prepared in (bf16, fp32):
        inject(prepared, settings_of(name, family))
        set_peft_model_state_dict(prepared.model, values)
    error = relative_error(logits_autocast(bf16.model, ids), logits_of(fp32.model, ids))
    assert 0 < error < 2 * own_error, (error, own_error)


def logits_autocast(model: Any, ids: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return logits_of(model, ids)


@each_cell
@pytest.mark.parametrize("padding", [1, 2, 3, 7])
def test_left_padding_changes_nothing(name: str, family: str, padding: int) -> None:
    model, ids = trained(name, family).model.eval(), tokens(2, 9)
    padded = torch.cat([tokens(2, padding, seed=5), ids], 1)
    mask = torch.ones_like(padded)
    mask[0, :padding] = 0
    with torch.no_grad():
        logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    alone = logits_of(model, ids[:1])
    assert relative_error(logits[:1, padding:], alone) < 1e-5
    whole = logits_of(model, padded[1:])  # its neighbour has no padding
    assert relative_error(logits[1:], whole) < 1e-5


@pytest.mark.parametrize("name", OWN)
def test_plain_peft_loads_the_export_onto_the_stock_base(name: str, tmp_path: Path) -> None:
    family = OWN[name].families[0]
    prepared, ids = trained(name, family), tokens(2, 19)
    directory = export_adapter(
        prepared.model, tmp_path / "adapter", base_id="someone/base", traits=prepared.traits
    )
    written = json.loads((directory / "adapter_config.json").read_text())
    assert written["peft_type"] == settings_of(name, family)["peft_type"]
    assert written["peft_type"] in (directory / "README.md").read_text()
    loaded = PeftModel.from_pretrained(make_stock(family), str(directory))
    assert torch.equal(logits_of(loaded, ids), logits_of(prepared.model, ids))


@each_cell
def test_several_adapters_on_one_base(name: str, family: str) -> None:
    settings = settings_of(name, family)
    config_class = CONFIGS[settings.pop("peft_type")]
    if "lora" in name:
        settings["stage"] = "warmup"
    base, ids = prepare(family).model, tokens(2, 19)
    before = logits_of(base, ids)
    model = get_peft_model(base, config_class(task_type="CAUSAL_LM", **settings))
    train_a_little(model, seed=1)
    first = logits_of(model, ids)
    model.add_adapter("second", config_class(task_type="CAUSAL_LM", **settings))
    assert torch.equal(logits_of(model, ids), first)
    model.set_adapter("second")
    started = relative_error(logits_of(model, ids), before)
    assert started > 1e-3 if name in NEVER_THE_BASE else started < 1e-5
    train_a_little(model, seed=2)
    second = logits_of(model, ids)
    assert relative_error(second, first) > 1e-3
    model.set_adapter("default")
    assert torch.equal(logits_of(model, ids), first)
    model.delete_adapter("second")
    assert torch.equal(logits_of(model, ids), first)


# ---------------------------------------------------------------- the equations


def test_the_initial_state_is_h0_of_the_recurrence() -> None:
    """Against a loop over tokens in float64."""
    prepared = trained("state", "mamba", seed=1)
    layer = next(m for n, m in prepared.model.named_modules() if n.endswith("initial_state"))
    mixer = layer.owner
    hidden = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual = mixer(hidden)
        x, z = mixer.in_proj(hidden).chunk(2, -1)
        x = mixer._convolve(x, None, None, None)
        dt, B, C = mixer.x_proj(x).split([mixer.time_step_rank, 8, 8], -1)
        dt = torch.nn.functional.softplus(mixer.dt_proj(dt)).double()
        A = -mixer.A_log.double().exp()
        h = layer.values["default"]["state"][0].double()
        rows = []
        for t in range(7):
            h = (dt[0, t, :, None] * A).exp() * h
            h = h + dt[0, t, :, None] * B[0, t].double() * x[0, t, :, None].double()
            rows.append(h @ C[0, t].double() + mixer.D * x[0, t])
        y = torch.stack(rows)[None] * torch.nn.functional.silu(z.double())
        expected = mixer.out_proj(y.float())
    assert relative_error(actual, expected) < 1e-5


def test_the_state_offset_is_added_at_the_readout() -> None:
    plain, offset = prepare("mamba", seed=1), trained("offset", "mamba", seed=1)
    layer = next(m for n, m in offset.model.named_modules() if n.endswith(".offset"))
    mixer = layer.owner
    bare = plain.model.backbone.layers[0].mixer
    bare.out_proj = torch.nn.Identity()
    mixer.out_proj = torch.nn.Identity()
    hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x, z = bare.in_proj(hidden).chunk(2, -1)
        C = bare.x_proj(bare._convolve(x, None, None, None))[..., -8:]
        p = layer.values["default"]["state"]
        expected = bare(hidden) + torch.nn.functional.silu(z) * torch.einsum("btn,dn->btd", C, p)
        assert relative_error(mixer(hidden), expected) < 1e-6


def test_a_frozen_parameter_s_delta_trains_like_the_parameter() -> None:
    """One Adam step on the deltas is one Adam step on the parameters themselves."""
    delta, plain = prepare("mamba"), prepare("mamba")
    entries = ["A_log", "dt_proj.bias", "layers.1"]
    inject(delta, {"peft_type": "LAYER_FREEZE", "trainable_layers": entries})
    named = dict(plain.model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(any(f".{entry}." in f".{name}." for entry in entries))
    for model in (delta.model, plain.model):
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            token_losses(model.train(), make_batch()).loss.backward()
            optimizer.step()
    count = [
        sum(p.numel() for p in m.parameters() if p.requires_grad)
        for m in (delta.model, plain.model)
    ]
    assert count[0] == count[1] > 0
    ids = tokens(2, 19)
    assert relative_error(logits_of(delta.model, ids), logits_of(plain.model, ids)) < 1e-4


def test_an_adapter_that_is_not_active_merges_no_part_of_what_fits_no_weight() -> None:
    config_class = CONFIGS["PARAM_TRANSFORM"]
    model = get_peft_model(prepare("mamba").model, config_class(scale_shape="n"))
    model.add_adapter("second", config_class(scale_shape="n", bias_shape="n"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for merge in (model.merge_adapter, lambda names: model.merge_and_unload(adapter_names=names)):
        with pytest.raises(InputError, match="cannot be merged, because only a scale"):
            merge(["second"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_safe_merge_refuses_what_is_not_finite() -> None:
    model = get_peft_model(prepare("mamba").model, CONFIGS["PARAM_TRANSFORM"](scale_shape="n"))
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "PARAM_TRANSFORM", "scale_shape": "n"},
        {"peft_type": "BITFIT", "target_modules": ["in_proj", "conv1d"]},
    ],
)
def test_unmerging_gives_the_weights_back(settings: dict[str, Any]) -> None:
    prepared = prepare("mamba", dtype=torch.bfloat16)
    inject(prepared, settings)
    for parameter in prepared.model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(-1)  # a scale of 0
    before = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    prepared.model.merge_adapter()
    prepared.model.unmerge_adapter()
    after = prepared.model.state_dict()
    assert after.keys() == before.keys()
    if settings["peft_type"] == "PARAM_TRANSFORM":
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_piece_of_padding_alone_passes_the_window_on() -> None:
    """A prompt that is read in pieces, the first of which is all padding in one row."""
    prepared = trained("state_and_window", "mamba")
    model, ids = prepared.model.eval(), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        second = model(
            input_ids=ids[:, 4:], attention_mask=mask, use_cache=True,
            cache_params=first.cache_params,
        )  # fmt: skip
    assert relative_error(second.logits[0, 2:], whole[0, 6:]) < 1e-5
    assert relative_error(second.logits[1], whole[1, 4:]) < 1e-5


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gla", OWN["state"].settings, "peft_type SSMPEFT: gla models have no initial state"),
        ("mamba2", OWN["offset"].settings, "STATE_OFFSET_TUNING: mamba2 models have no offset"),
        (
            "mamba",
            {"peft_type": "STATE_OFFSET_TUNING", "r": 9},
            "r is 9, but the matrix is 64 x 8, of rank 8 at most; lower r",
        ),
        (
            "mamba",
            {"peft_type": "LAYER_FREEZE", "trainable_layers": ["A_lgo"]},
            "trainable_layers: 'A_lgo' is in no parameter name; did you mean 'A_log'",
        ),
        (
            "mamba",
            {"peft_type": "LAYER_FREEZE", "trainable_layers": ["embeddings"]},
            "backbone.embeddings.weight is shared by two modules",
        ),
        (
            "mamba",
            {"peft_type": "BITFIT", "target_modules": ["in_porj"]},
            "target_modules: 'in_porj' matches no layer; did you mean 'in_proj'",
        ),
    ],
)
def test_what_does_not_go_together(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        inject(prepare(family, tie_word_embeddings=True), settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "SSMPEFT"}, "scan and conv_init_state are both off, so nothing would train"),
        ({"peft_type": "SSMPEFT", "scan": {"type": "x"}}, "peft: scan is 'x'"),
        (
            {"peft_type": "SSMPEFT", "conv_init_state": True, "state_to_y": {"type": "transform"}},
            "state_to_y is a method of its own here: PARAM_TRANSFORM",
        ),
        (
            {"peft_type": "SSMPEFT", "conv_init_state": True, "target_modules": ["x_proj"]},
            "target_modules ['x_proj']: scan and conv_init_state say what trains, here ['conv1d']",
        ),
        ({"peft_type": "LAYER_FREEZE"}, "peft: trainable_layers is"),
        ({"peft_type": "LAYER_FREEZE", "trainable_layers": []}, "peft: trainable_layers is []"),
        (
            {"peft_type": "STATE_OFFSET_TUNING", "tuning_mode": "OUTPUT_TUNING", "r": 2},
            "r has no meaning for OUTPUT_TUNING",
        ),
        ({"peft_type": "BITFIT", "r": 8}, "unknown key 'r' for peft_type BITFIT"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_peft(settings)


def test_what_the_log_says() -> None:
    prepared = trained("state_and_window", "mamba")
    assert str(measure_coverage(prepared.model)) == (
        "SSMPEFT at 4 places (backbone.layers.*.mixer.initial_window, "
        "backbone.layers.*.mixer.initial_state), 1.41 K of 20.2 K parameters (7.0%)"
    )
