"""Methods that change the scan of Mamba-1, PARAM_TRANSFORM and ADDITIONAL_SCAN: against a loop over
tokens in float64, merged, and with settings that mean nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft_tiny import (
    logits_of,
    make_batch,
    prepare,
    relative_error,
    token_losses,
    tokens,
    train_a_little,
)
from torch import Tensor
from transformers import MambaForCausalLM

from ssm_train.errors import InputError
from ssm_train.optim import decays
from ssm_train.peft.merge import merge_adapter, write_merged
from ssm_train.peft.spec import load_peft
from ssm_train.peft.tuner import own_layers


def inject(prepared: Any, settings: dict[str, Any]) -> None:
    spec = load_peft(settings)
    assert spec is not None
    spec.make().inject(prepared)


def trained_mixer(family: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The model, and its first mixer, under a method whose values were moved."""
    prepared = prepare(family, seed=1)
    inject(prepared, settings)
    train_a_little(prepared.model)
    return prepared, prepared.model.get_base_model().backbone.layers[0].mixer


def hidden_states(rows: int = 1, length: int = 7) -> Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(0))


def convolved(mixer: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """x after the convolution and z [T, d], dt [T, d], B and C [T, n] of the base, in float64."""
    x, z = mixer.in_proj(hidden).chunk(2, -1)
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    padded = F.pad(x.mT, (weight.shape[-1] - 1, 0))
    x = F.silu(F.conv1d(padded, weight, bias, groups=len(weight)).mT)
    dt, B, C = x.squeeze(0).matmul(mixer.x_proj.weight.T).split([mixer.time_step_rank, 8, 8], -1)
    dt = F.softplus(dt @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    return tuple(v.squeeze(0).double() for v in (x, z, dt, B, C))


def scan_by_the_paper(
    mixer: Any, x: Tensor, z: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> Tensor:
    """The mixer's output [1, T, hidden] from B and C [T, d, n]: algorithm 2 of arXiv 2312.00752."""
    h, rows = torch.zeros_like(A), []
    for t in range(len(x)):
        h = (dt[t, :, None] * A).exp() * h + (dt[t] * x[t])[:, None] * B[t]
        rows.append(((h * C[t]).sum(-1) + mixer.D * x[t]) * F.silu(z[t]))
    return mixer.out_proj(torch.stack(rows)[None].float())


# ---------------------------------------------------------------- PARAM_TRANSFORM


TRANSFORMS: list[dict[str, Any]] = [
    *({"scale_shape": shape} for shape in ("n", "d", "dn")),
    *({"bias_shape": shape} for shape in ("n", "d", ["n", "d"])),
    {"scale_shape": "n", "bias_shape": "d"},
    {"scale_shape": "d", "bias_shape": "n", "init": "random"},
    {"scale_shape": "dn", "r": 2},
    {"scale_shape": "dn", "bias_shape": "dn", "r": 1},
    {"scale_shape": "n", "bias_shape": "dn", "r": 2},
]


@pytest.mark.parametrize("parameters", [["B"], ["C"], ["B", "C"]])
@pytest.mark.parametrize("settings", TRANSFORMS, ids=str)
def test_b_and_c_are_scaled_and_shifted(parameters: list[str], settings: dict[str, Any]) -> None:
    peft = {"peft_type": "PARAM_TRANSFORM", "parameters": parameters, **settings}
    _, mixer = trained_mixer("mamba", peft)
    hidden = hidden_states()
    with torch.no_grad():
        x, z, dt, *matrices = convolved(mixer, hidden)
        for i, site in enumerate((mixer.input_matrix, mixer.output_matrix)):
            matrices[i] = matrices[i][:, None]  # [T, 1, n]
            if "BC"[i] not in parameters:
                continue
            values = dict(site.values["default"].items())
            for part in ("scale", "bias"):
                if "r" in settings and f"{part}_left" in values:
                    values[part] = values[f"{part}_left"] @ values[f"{part}_right"]
            s, b = (values.get(part, torch.zeros(1)).double() for part in ("scale", "bias"))
            matrices[i] = (1 + s) * matrices[i] + b
        A = -mixer.A_log.double().exp()
        expected = scan_by_the_paper(mixer, x, z, dt, A, *matrices)
        assert relative_error(mixer(hidden), expected) < 1e-5


def test_a_random_start_changes_the_function() -> None:
    prepared, ids = prepare("mamba"), tokens(2, 19)
    before = logits_of(prepared.model, ids)
    inject(prepared, {"peft_type": "PARAM_TRANSFORM", "scale_shape": "n", "init": "random"})
    assert relative_error(logits_of(prepared.model, ids), before) > 1e-3


@pytest.mark.parametrize(
    "settings", [{"scale_shape": "d"}, {"scale_shape": "n", "bias_shape": "n"}]
)
def test_what_no_row_of_x_proj_holds_is_not_merged(settings: dict[str, Any]) -> None:
    prepared, _ = trained_mixer("mamba", {"peft_type": "PARAM_TRANSFORM", **settings})
    with pytest.raises(InputError, match='only a scale of shape "n", without a bias'):
        merge_adapter(prepared.model, prepared.traits)


# ---------------------------------------------------------------- ADDITIONAL_SCAN

MORE_STATES = {"peft_type": "ADDITIONAL_SCAN", "num_states": 3}


def test_one_scan_has_the_new_states_beside_the_old_ones() -> None:
    _, mixer = trained_mixer("mamba", MORE_STATES)
    hidden, added = hidden_states(), mixer.extra_states.values["default"]
    with torch.no_grad():
        x, z, dt, B, C = convolved(mixer, hidden)
        B = torch.cat([B, x @ added["B"].double().T], -1)
        C = torch.cat([C, x @ added["C"].double().T], -1)
        A = -torch.cat([mixer.A_log, added["A_log"]], -1).double().exp()
        expected = scan_by_the_paper(mixer, x, z, dt, A, B[:, None], C[:, None])
        assert A.shape == (64, 11)
        assert relative_error(mixer(hidden), expected) < 1e-5


def test_new_states_start_as_slow_ones_that_nothing_reads() -> None:
    prepared = prepare("mamba")
    inject(prepared, MORE_STATES)
    token_losses(prepared.model, make_batch()).loss.backward()
    for layer in own_layers(prepared.model).values():
        values = layer.values["default"]
        A_log = layer.owner.A_log
        assert torch.equal(values["A_log"], A_log[:, :1].expand(-1, 3))
        assert (A_log >= A_log[:, :1]).all()
        assert values["C"].grad.abs().max() > 0
        assert values["B"].grad.abs().max() == values["A_log"].grad.abs().max() == 0


def test_new_decays_have_no_weight_decay() -> None:
    prepared = prepare("mamba")
    inject(prepared, MORE_STATES)
    decayed = {
        name.rpartition(".")[2]: decays(name, parameter, prepared.traits.no_decay)
        for name, parameter in prepared.model.named_parameters()
        if parameter.requires_grad
    }
    assert decayed == {"A_log": False, "B": True, "C": True}


def test_merged_it_is_a_stock_mamba_with_more_states(tmp_path: Path) -> None:
    prepared, _ = trained_mixer("mamba", MORE_STATES)
    ids = tokens(2, 19)
    expected = logits_of(prepared.model, ids)
    merged = merge_adapter(prepared.model, prepared.traits)
    write_merged(merged, tmp_path / "merged", base_id="someone/base")
    stock = MambaForCausalLM.from_pretrained(tmp_path / "merged")
    assert stock.config.state_size == 11
    assert relative_error(logits_of(stock, ids), expected) < 1e-5


# ---------------------------------------------------------------- both


@pytest.mark.parametrize(
    "settings", [{"peft_type": "PARAM_TRANSFORM", "scale_shape": "n"}, MORE_STATES], ids=str
)
def test_merging_can_be_undone(settings: dict[str, Any]) -> None:
    prepared, _ = trained_mixer("mamba", settings)
    model, ids = prepared.model, tokens(2, 19)
    before = logits_of(model, ids)
    model.merge_adapter()
    assert relative_error(logits_of(model, ids), before) < 1e-5
    model.unmerge_adapter()
    assert relative_error(logits_of(model, ids), before) < 1e-5
    assert model.config.state_size == 8


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "PARAM_TRANSFORM"}, "scale_shape and bias_shape are both null, so nothing"),
        (
            {"peft_type": "PARAM_TRANSFORM", "scale_shape": "bln"},
            "peft: scale_shape is 'bln', but a shape is n (states), d (channels) or dn",
        ),
        (
            {"peft_type": "PARAM_TRANSFORM", "bias_shape": ["d", "d"]},
            "peft: bias_shape is ['d', 'd'], but a shape is n",
        ),
        ({"peft_type": "PARAM_TRANSFORM", "scale_shape": ""}, "peft: scale_shape is ''"),
        ({"peft_type": "PARAM_TRANSFORM", "scale_shape": 3}, "peft: scale_shape is 3"),
        (
            {"peft_type": "PARAM_TRANSFORM", "parameters": [], "scale_shape": "n"},
            "peft: parameters is []",
        ),
        (
            {"peft_type": "PARAM_TRANSFORM", "parameters": ["A"], "scale_shape": "n"},
            "peft: parameters is 'A'",
        ),
        (
            {"peft_type": "PARAM_TRANSFORM", "scale_shape": "n", "r": 2},
            "r has a meaning only for a scale or a bias of shape dn",
        ),
        (
            {"peft_type": "PARAM_TRANSFORM", "scale_shape": "dn", "r": 2, "init": "random"},
            "init random has no meaning with r",
        ),
        ({"peft_type": "ADDITIONAL_SCAN", "num_states": 0}, "peft: num_states is 0"),
        ({"peft_type": "ADDITIONAL_SCAN", "r": 2}, "unknown key 'r' for peft_type ADDITIONAL_SCAN"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        load_peft(settings)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "mamba2",
            {"peft_type": "PARAM_TRANSFORM", "scale_shape": "n"},
            "peft_type PARAM_TRANSFORM: mamba2 models have no input matrix to train",
        ),
        (
            "mamba2",
            MORE_STATES,
            "peft_type ADDITIONAL_SCAN: mamba2 models have no extra states to train",
        ),
    ],
)
def test_what_does_not_go_together(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        inject(prepare(family), settings)
