"""Learning rates against transformers' schedules, LoRA+ against PEFT's optimizer; weight decay; the
skip on the device."""

from collections import OrderedDict
from typing import get_args

import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from ssm_train.adapters.base import Prepared, Traits
from ssm_train.optim import (
    OptimSettings,
    build_optimizer,
    decays,
    describe_rates,
    lr_at,
    parameter_groups,
)
from ssm_train.peft.lora import LoraMethod, LoraSettings

KINDS = get_args(OptimSettings.model_fields["lr_scheduler_type"].annotation)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 3])
def test_lr_at_equals_transformers(kind, warmup):
    settings = OptimSettings(learning_rate=2e-3, lr_scheduler_type=kind, warmup_steps=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    schedule = transformers.get_scheduler(kind, optimizer, warmup, 20)
    for step in range(20):
        assert lr_at(step, 20, settings) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_warmup_ratio_is_a_share_of_all_steps_and_warmup_steps_wins():
    assert lr_at(1, 20, OptimSettings(learning_rate=1.0, warmup_ratio=0.1)) == 0.5
    both = OptimSettings(learning_rate=1.0, warmup_ratio=0.5, warmup_steps=2)
    assert lr_at(2, 20, both) == 1.0


def test_decay_spares_vectors_and_named_parameters():
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert decays("layers.0.mixer.in_proj.weight", matrix, ("A_log",))
    assert not decays("layers.0.mixer.A_log", matrix, ("A_log",))
    assert not decays("layers.0.norm.weight", vector, ())
    assert decays("layers.0.mixer.not_A_log", matrix, ("A_log",))
    assert not decays("model.attn.gk_proj.1.bias", matrix, ("gk_proj.1.bias",))


def test_groups_hold_every_trainable_parameter_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    model[2].requires_grad_(False)
    groups = parameter_groups(model, OptimSettings(weight_decay=0.1), ())
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert [p.ndim for g in groups for p in g["params"]] == [2, 1, 1, 1]


def test_found_inf_leaves_parameters_moments_and_step_count_alone():
    layer = nn.Linear(2, 2, bias=False)
    optimizer = build_optimizer(layer, OptimSettings(weight_decay=0.1), ())
    layer.weight.grad = torch.ones(2, 2)
    optimizer.step()
    before = [t.clone() for t in (layer.weight.data, *optimizer.state[layer.weight].values())]
    layer.weight.grad = torch.full((2, 2), float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = (layer.weight.data, *optimizer.state[layer.weight].values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---------------------------------------------------------------- LoRA+


def make_lora(ratio: float | None) -> tuple[nn.Module, LoraMethod]:
    torch.manual_seed(0)
    layers = {"q_proj": nn.Linear(4, 6), "v_proj": nn.Linear(6, 4), "head": nn.Linear(4, 3)}
    method = LoraMethod(
        LoraSettings(r=2, modules_to_save=["head"], loraplus_lr_ratio=ratio, use_rslora=True)
    )
    prepared = Prepared(nn.Sequential(OrderedDict(layers)), None, Traits(("q_proj", "v_proj")))
    method.inject(prepared)
    return prepared.model, method


def step(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    """The trained parameters after some steps on the same random gradients."""
    generator = torch.Generator().manual_seed(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(steps):
        for parameter in trained.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: p.detach().clone() for name, p in trained.items()}


def test_lora_plus_equals_peft():
    settings = OptimSettings(learning_rate=1e-2, weight_decay=0.3)
    (ours, method), (theirs, _) = make_lora(16.0), make_lora(16.0)
    optimizer = build_optimizer(ours, settings, (), method.lr_scale)
    expected = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, loraplus_weight_decay=0.3
    )
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[p] for name, p in ours.named_parameters() if p in rates} == {
        name: 0.16 if "lora_B" in name else 1e-2
        for name, p in ours.named_parameters()
        if p.requires_grad
    }
    after, reference = step(optimizer, ours), step(expected, theirs)
    assert after.keys() == reference.keys() and len(after) == 6
    for name, tensor in after.items():
        if name.endswith("head.modules_to_save.default.bias"):
            continue  # PEFT gives every vector the rate of B
        torch.testing.assert_close(tensor, reference[name], atol=1e-6, rtol=1e-6)
    assert describe_rates(optimizer) == ["learning rate x 16 for 2 of 6 trained tensors"]


def test_without_a_ratio_lora_plus_is_lora_to_the_bit():
    settings = OptimSettings(learning_rate=1e-2, weight_decay=0.3)
    results = []
    for ratio in (None, 1.0):
        model, method = make_lora(ratio)
        optimizer = build_optimizer(model, settings, (), method.lr_scale)
        assert describe_rates(optimizer) == []
        results.append(step(optimizer, model))
    model, _ = make_lora(None)
    results.append(step(build_optimizer(model, settings, ()), model))
    for result in results[1:]:
        assert all(torch.equal(tensor, results[0][name]) for name, tensor in result.items())


def test_lora_plus_reaches_the_factor_b_of_embeddings_only():
    method = LoraMethod(LoraSettings(loraplus_lr_ratio=4.0))
    assert method.lr_scale("model.embeddings.lora_embedding_B.default") == 4
    assert method.lr_scale("model.embeddings.lora_embedding_A.default") == 1
    assert method.lr_scale("model.mixer.in_proj.lora_magnitude_vector.default.weight") == 1
