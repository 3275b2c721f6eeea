"""The loss that never holds all logits, against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssm_train import loss as losses
from ssm_train.loss import IGNORED, sum_cross_entropy, sum_linear_cross_entropy

T, H, V, S = 11, 6, 29, 8


def draw(frozen: bool = False) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(T, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=not frozen)
    return hidden, weight, torch.randperm(T)[:S], torch.randint(0, V, (S,))


@pytest.mark.parametrize("rows_at_once", [1, 3, S, 100])
@pytest.mark.parametrize("frozen", [False, True])
def test_value_and_gradients(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int, frozen: bool
) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", V * rows_at_once)
    hidden, weight, positions, targets = draw(frozen)
    targets[2] = IGNORED
    inputs = [hidden] if frozen else [hidden, weight]
    ours = sum_linear_cross_entropy(hidden, weight, positions, targets, torch.float32)
    theirs = F.cross_entropy(
        (hidden[positions] @ weight.T).double(), targets, reduction="sum", ignore_index=IGNORED
    )
    torch.testing.assert_close(ours.double(), theirs)
    found = torch.autograd.grad(3 * ours, inputs)
    for gradient, expected in zip(found, torch.autograd.grad(3 * theirs, inputs), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_padding_of_positions_changes_nothing() -> None:
    hidden, weight, positions, targets = draw()
    more_positions = torch.cat([positions, positions.new_zeros(3)])
    more_targets = torch.cat([targets, targets.new_full((3,), IGNORED)])
    results = [
        sum_linear_cross_entropy(hidden, weight, *pair, torch.float32)
        for pair in ((positions, targets), (more_positions, more_targets))
    ]
    assert torch.equal(*results)
    first, second = (torch.autograd.grad(value, [hidden, weight]) for value in results)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_no_targets_give_nothing() -> None:
    hidden, weight, *_ = draw()
    none = torch.empty(0, dtype=torch.int64)
    value = sum_linear_cross_entropy(hidden, weight, none, none, torch.float32)
    assert value == 0
    assert not torch.autograd.grad(value, [hidden])[0].any()


def test_bf16_is_no_worse_than_under_autocast() -> None:
    hidden, weight, positions, targets = draw()
    exact = torch.autograd.grad(
        sum_cross_entropy(hidden[positions] @ weight.T, targets), [hidden, weight]
    )
    with torch.autocast("cpu", torch.bfloat16):
        plain = sum_cross_entropy(F.linear(hidden[positions], weight), targets)
    ours = sum_linear_cross_entropy(hidden, weight, positions, targets, torch.bfloat16)
    for found, allowed, wanted in zip(
        torch.autograd.grad(ours, [hidden, weight]),
        torch.autograd.grad(plain, [hidden, weight]),
        exact,
        strict=True,
    ):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() <= 2 * (allowed - wanted).norm()
