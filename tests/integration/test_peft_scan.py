"""PARAM_TRANSFORM against a loop over tokens in float64, and what is said of settings that mean
nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft_tiny import logits_of, prepare, relative_error, tokens, train_a_little
from torch import Tensor

from ssm_train.errors import InputError
from ssm_train.peft.merge import merge_adapter
from ssm_train.peft.spec import load_peft


def trained_mixer(family: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The model, and its first mixer, under a method whose values were moved."""
    prepared = prepare(family, seed=1)
    spec = load_peft(settings)
    assert spec is not None
    spec.make().inject(prepared)
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
    spec = load_peft({"peft_type": "PARAM_TRANSFORM", "scale_shape": "n", "init": "random"})
    assert spec is not None
    spec.make().inject(prepared)
    assert relative_error(logits_of(prepared.model, ids), before) > 1e-3


@pytest.mark.parametrize(
    "settings", [{"scale_shape": "d"}, {"scale_shape": "n", "bias_shape": "n"}]
)
def test_what_no_row_of_x_proj_holds_is_not_merged(settings: dict[str, Any]) -> None:
    prepared, _ = trained_mixer("mamba", {"peft_type": "PARAM_TRANSFORM", **settings})
    with pytest.raises(InputError, match='only "scale_shape": "n" without a bias can be'):
        merge_adapter(prepared.model, prepared.traits)


def test_merging_can_be_undone() -> None:
    prepared, _ = trained_mixer("mamba", {"peft_type": "PARAM_TRANSFORM", "scale_shape": "n"})
    model, ids = prepared.model, tokens(2, 19)
    before = logits_of(model, ids)
    model.merge_adapter()
    assert relative_error(logits_of(model, ids), before) < 1e-5
    model.unmerge_adapter()
    assert relative_error(logits_of(model, ids), before) < 1e-5


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
    ],
)
def test_what_does_not_go_together(family: str, settings: dict[str, Any], message: str) -> None:
    spec = load_peft(settings)
    assert spec is not None
    with pytest.raises(InputError, match=re.escape(message)):
        spec.make().inject(prepare(family))
