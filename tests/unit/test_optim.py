"""Learning rates against transformers' schedules; weight decay; the skip on the device."""

from typing import get_args

import pytest
import torch
import transformers
from torch import nn

from ssm_train.optim import OptimSettings, build_optimizer, decays, lr_at, parameter_groups

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
