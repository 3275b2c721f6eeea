"""Fused LoRA layers against their definition, and PEFT's layer through them against PEFT's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssm_train.adapters.modules import Fp32BiasLinear, project
from ssm_train.kernels.lora_linear import (
    LoraLinear,
    constant_factors,
    lora_linears,
    reference,
    row_norms,
)

RANKS = (2, 3, 1)


def make_layers(dtype: torch.dtype, seed: int = 0) -> list[LoraLinear]:
    """Three layers of one input, each with another width, rank and scaling, one with a bias."""
    torch.manual_seed(seed)
    return [
        LoraLinear(
            torch.randn(out, 10, dtype=dtype, requires_grad=True),
            torch.randn(out, dtype=dtype, requires_grad=True) if out == 7 else None,
            torch.randn(r, 10, dtype=dtype, requires_grad=True),
            torch.randn(out, r, dtype=dtype, requires_grad=True),
            0.5 * r,
        )
        for out, r in zip((6, 7, 5), RANKS, strict=True)
    ]


def leaves(layers: list[LoraLinear]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in layer[:4] if tensor is not None]


def test_values_and_all_gradients_are_those_of_the_definition() -> None:
    layers = make_layers(torch.float64)
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    ours, theirs = lora_linears(x, layers), reference.lora_linears(x, layers)
    weights = [torch.randn_like(y) for y in theirs]
    inputs = [x, *leaves(layers)]
    for y, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found, wanted = (
        torch.autograd.grad([(y * w).sum() for y, w in zip(ys, weights, strict=True)], inputs)
        for ys in (ours, theirs)
    )
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_factors_are_read_once_where_they_are_constant() -> None:
    layers = make_layers(torch.float32)
    x = torch.randn(3, 10)
    with torch.no_grad():
        expected = lora_linears(x, layers)
        with constant_factors():
            for _ in range(2):
                torch.testing.assert_close(lora_linears(x, layers), expected, rtol=0, atol=0)
            (single,) = lora_linears(x, layers[:1])  # another group of the same factors
            torch.testing.assert_close(single, expected[0])
            layers[0].A.mul_(2)
            torch.testing.assert_close(lora_linears(x, layers), expected, rtol=0, atol=0)
        assert not torch.equal(lora_linears(x, layers)[0], expected[0])


def test_factors_are_constant_in_one_thread_alone() -> None:
    layers, x = make_layers(torch.float32), torch.randn(3, 10)
    leave = threading.Event()

    def hold() -> None:
        with constant_factors():
            entered.set()
            leave.wait(10)

    entered = threading.Event()
    other = threading.Thread(target=hold)
    with torch.no_grad():
        with constant_factors():
            other.start()
            assert entered.wait(10)
        expected = lora_linears(x, layers)[0]
        leave.set()
        other.join()
        layers[0].A.mul_(2)
        assert not torch.equal(lora_linears(x, layers)[0], expected)


def test_an_output_that_nobody_uses_has_no_part_in_the_gradient() -> None:
    layers = make_layers(torch.float64)
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(lora_linears(x, layers)[1].sum(), [x])
    (wanted,) = torch.autograd.grad(reference.lora_linears(x, layers)[1].sum(), [x])
    torch.testing.assert_close(found, wanted)


def test_frozen_weights_get_no_gradient() -> None:
    layers = make_layers(torch.float32)
    for layer in layers:
        layer.weight.requires_grad_(False)
    x = torch.randn(3, 10)
    sum(y.sum() for y in lora_linears(x, layers)).backward()
    assert all(layer.weight.grad is None for layer in layers)
    assert all(layer.A.grad is not None and layer.B.grad is not None for layer in layers)


def test_dropout_is_one_mask_on_what_A_reads() -> None:
    layers = make_layers(torch.float64)
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    ours = lora_linears(x, layers, dropout=0.25)
    torch.manual_seed(1)
    keep = torch.native_dropout(torch.ones_like(x), 0.25, True)[0].detach()
    assert 0 < int((keep == 0).sum()) < keep.numel()
    theirs = reference.lora_linears(x, layers, keep)
    inputs = [x, *leaves(layers)]
    found, wanted = (
        torch.autograd.grad(sum(y.square().sum() for y in ys), inputs) for ys in (ours, theirs)
    )
    for a, b in zip((*ours, *found), (*theirs, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_row_norms_are_those_of_the_sum() -> None:
    for layer in make_layers(torch.float64):
        found = row_norms(layer, layer.weight.square().sum(1))
        torch.testing.assert_close(found, reference.row_norms(layer).detach())


class Block(nn.Module):
    """Two projections of one input, and one after them whose bias is fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.dt = nn.Linear(12, 8), nn.Linear(12, 8, False), Fp32BiasLinear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k = project(x, self.q, self.k)
        return self.dt(q * k)


def adapted(**settings: Any) -> nn.Module:
    import peft

    from ssm_train.peft.registration import SsmLoraConfig

    torch.manual_seed(0)
    block = Block()
    config = SsmLoraConfig(r=3, lora_alpha=6, target_modules=["q", "k", "dt"], **settings)
    model = peft.get_peft_model(block, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def as_peft_has_it(model: nn.Module) -> None:
    from peft.tuners.lora import Linear

    from ssm_train.peft.fused_lora import FusedLoraLinear

    layers = [module for module in model.modules() if isinstance(module, FusedLoraLinear)]
    assert {type(layer.base_layer) for layer in layers} == {nn.Linear, Fp32BiasLinear}
    for layer in layers:
        layer.__class__ = Linear


def run(model: nn.Module, x: Tensor, precision: str) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        y = model(x)
    y.float().square().mean().backward()
    return [y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_layer_equals_that_of_peft(settings: dict[str, Any]) -> None:
    x = torch.randn(2, 5, 12)
    ours, theirs = adapted(**settings), adapted(**settings)
    as_peft_has_it(theirs)
    for a, b in zip(run(ours, x, "fp32"), run(theirs, x, "fp32"), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_in_bf16_no_worse_than_peft(settings: dict[str, Any]) -> None:
    x = torch.randn(4, 50, 12)
    ours, theirs = adapted(**settings), adapted(**settings)
    as_peft_has_it(theirs)
    exact = run(theirs, x, "fp32")
    theirs.zero_grad()
    errors = []
    for model in (ours, theirs):
        found = run(model, x, "autocast")
        assert all(a.dtype == b.dtype for a, b in zip(found, exact, strict=True))
        errors.append(
            [float(((a - b).norm() / b.norm()).detach()) for a, b in zip(found, exact, strict=True)]
        )
    assert max(errors[0]) < 0.05
    assert sum(errors[0]) <= 2 * sum(errors[1]), errors


def switch_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def merge(model: Any) -> None:
    model.base_model.merge_adapter()


def add_another(model: Any) -> None:
    from ssm_train.peft.registration import SsmLoraConfig

    torch.manual_seed(3)
    config = SsmLoraConfig(r=2, init_lora_weights=False, target_modules=["q", "k"])
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])


def hook(model: Any) -> None:
    model.base_model.model.k.base_layer.register_forward_hook(lambda _m, _i, output: 2 * output)


@pytest.mark.parametrize("change", [switch_off, merge, add_another, hook])
def test_what_the_op_does_not_know_goes_the_way_of_peft(change: Callable[[Any], None]) -> None:
    x = torch.randn(2, 5, 12)
    ours, theirs = adapted(), adapted()
    change(ours)
    change(theirs)
    as_peft_has_it(theirs)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_layers_of_one_input_are_one_operation(settings: dict[str, Any]) -> None:
    y = adapted(**settings)(torch.randn(2, 5, 12))
    names = set()
    todo = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in names:
            names.add(node)
            todo += [parent for parent, _ in node.next_functions]
    assert sum("LoraLinears" in node.name() for node in names) == 2  # q with k, and dt


def test_a_changed_base_weight_has_other_norms() -> None:
    ours, theirs = adapted(use_dora=True), adapted(use_dora=True)
    as_peft_has_it(theirs)
    x = torch.randn(2, 5, 12)
    for model in (ours, theirs):
        model(x)
        with torch.no_grad():
            model.base_model.model.q.base_layer.weight.mul_(2)
    torch.testing.assert_close(ours(x), theirs(x))


def test_an_fp32_input_is_cast_and_kept_once_for_all_its_projections() -> None:
    kept: dict[int, Tensor] = {}

    def keep(saved: Tensor) -> Tensor:
        if saved.dtype == torch.bfloat16 and saved.shape == (5, 12):
            kept[saved.data_ptr()] = saved
        return saved

    x = 2 * torch.randn(5, 12, requires_grad=True)  # no leaf: autocast keeps casts of those itself
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved),
        torch.autocast("cpu", torch.bfloat16),
    ):
        project(x, nn.Linear(12, 7), nn.Linear(12, 7, False), Fp32BiasLinear(12, 7))
    assert len(kept) == 1
