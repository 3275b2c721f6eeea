"""AFFIX_TUNING against the stock mixer with the tokens inserted and their outputs dropped."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft_tiny import make_stock, prepare, relative_error, train_a_little
from torch import Tensor, nn

from ssm_train.errors import InputError
from ssm_train.peft.registration import CONFIGS
from ssm_train.peft.spec import load_peft
from ssm_train.peft.tuner import own_layers

FAMILIES = ("mamba", "mamba2", "bamba")


def with_affix(family: str, num_tokens: int) -> tuple[Any, nn.Parameter]:
    """The first mixer of a model of ours in float64, and its trained tokens [m, hidden]."""
    prepared = prepare(family)
    spec = load_peft({"peft_type": "AFFIX_TUNING", "num_virtual_tokens": num_tokens})
    assert spec is not None
    spec.make().inject(prepared)
    train_a_little(prepared.model, scale=1.0)
    prepared.model.double()
    layer = next(iter(own_layers(prepared.model).values()))
    return layer.owner, layer.values["default"]["tokens"]


def stock_mixer(family: str) -> nn.Module:
    names = ("MambaMixer", "Mamba2Mixer", "BambaMixer")
    model = make_stock(family).double()
    return next(m for m in model.modules() if type(m).__name__ in names)


def hidden_states(rows: int, length: int) -> Tensor:
    shape = (rows, length, 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7])  # fewer and more than the window's 3
@pytest.mark.parametrize("family", FAMILIES)
def test_the_affix_is_as_if_inserted(family: str, num_tokens: int) -> None:
    mixer, tokens = with_affix(family, num_tokens)
    hidden = hidden_states(2, 11)
    weights = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1))
    actual = mixer(hidden)
    inserted = tokens.detach().clone().requires_grad_()
    whole = torch.cat([inserted.expand(2, -1, -1), hidden], 1)
    expected = stock_mixer(family)(whole)[:, num_tokens:]
    assert relative_error(mixer.initial_context((None, None), hidden)[1], torch.zeros(1)) > 0
    assert relative_error(actual, expected) < 1e-6
    ours = torch.autograd.grad((actual * weights).sum(), tokens)[0]
    theirs = torch.autograd.grad((expected * weights).sum(), inserted)[0]
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_mixers_have_the_same_gradients(family: str) -> None:
    found = []
    for recompute in (False, True):
        mixer, tokens = with_affix(family, 3)
        mixer.train().recompute = recompute
        mixer(hidden_states(2, 11)).square().sum().backward()
        assert tokens.grad is not None
        found.append(tokens.grad)
    assert relative_error(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_without_it_the_mixer_says_something_else(family: str) -> None:
    mixer, _ = with_affix(family, 2)
    hidden = hidden_states(1, 5)
    with torch.no_grad():
        assert relative_error(mixer(hidden), stock_mixer(family)(hidden)) > 1e-2


def test_two_affixes_stand_one_after_the_other() -> None:
    prepared = prepare("mamba")
    config_class = CONFIGS["AFFIX_TUNING"]
    spec = load_peft({"peft_type": "AFFIX_TUNING", "num_virtual_tokens": 2})
    assert spec is not None
    spec.make().inject(prepared)
    model: Any = prepared.model
    model.add_adapter("second", config_class(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.base_model.set_adapter(["default", "second"])
    train_a_little(model, scale=1.0)
    model.double()
    layer = next(iter(own_layers(model).values()))
    affixes = [layer.values[name]["tokens"] for name in ("default", "second")]
    hidden = hidden_states(1, 6)
    with torch.no_grad():
        expected = stock_mixer("mamba")(torch.cat([torch.cat(affixes)[None], hidden], 1))[:, 5:]
        assert relative_error(layer.owner(hidden), expected) < 1e-6


def test_it_says_why_step_0_differs() -> None:
    assert "state that the affix leaves" in CONFIGS["AFFIX_TUNING"].tuner.changes_function
    assert not CONFIGS["SSMPEFT"].tuner.changes_function


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, "peft: num_virtual_tokens is 0"),
        ({"num_tokens": 2}, "unknown key 'num_tokens' for peft_type AFFIX_TUNING"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_peft({"peft_type": "AFFIX_TUNING", **settings})


def test_a_model_without_a_recurrence_to_start() -> None:
    spec = load_peft({"peft_type": "AFFIX_TUNING"})
    assert spec is not None
    with pytest.raises(InputError, match="AFFIX_TUNING: gla models have no initial context"):
        spec.make().inject(prepare("gla"))
