"""What counts as a loss spike."""

import math
import random

from ssm_train.health.spikes import LEAST, WINDOW, describe, is_spike, remember


def noisy(count: int) -> list[float]:
    chance = random.Random(0)
    return [2 + chance.gauss(0, 0.1) for _ in range(count)]


def test_a_loss_far_above_the_usual_is_one_and_noise_is_none() -> None:
    losses = noisy(WINDOW)
    assert is_spike(4.0, losses, 20)
    assert not is_spike(0.0, losses, 20)
    assert not any(is_spike(loss, losses, 20) for loss in noisy(1000))
    assert not is_spike(4.0, losses, 0)


def test_wild_losses_in_the_window_hide_none() -> None:
    losses = noisy(WINDOW - 20) + [1e6] * 20
    assert is_spike(10.0, losses, 20)


def test_equal_losses_are_no_reason_to_cry_at_the_next() -> None:
    assert not is_spike(2.01, [2.0] * WINDOW, 20)
    assert is_spike(2.5, [2.0] * WINDOW, 20)


def test_there_must_be_enough_to_compare_with() -> None:
    assert not is_spike(100.0, noisy(LEAST - 1), 20)
    assert is_spike(100.0, noisy(LEAST), 20)


def test_the_window_is_bounded_and_holds_numbers_only() -> None:
    losses: list[float] = []
    for i in range(2 * WINDOW):
        remember(float(i), losses)
    remember(math.nan, losses)
    remember(math.inf, losses)
    assert losses == [float(i) for i in range(WINDOW, 2 * WINDOW)]


def test_the_line_says_how_many_and_which_is_largest() -> None:
    usual = [2.0] * WINDOW
    assert describe([(4.0, 70)], usual) == "a loss spike: 4 in step 70, where 2 is usual"
    assert describe([(4.0, 70), (9.0, 71)], usual) == (
        "2 loss spikes, the largest: 9 in step 71, where 2 is usual"
    )
