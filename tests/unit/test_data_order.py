"""The arithmetic order: a permutation an epoch, the same steps on any cut of the global batch."""

from collections import Counter

import numpy as np
import pytest

from ssm_train.data import DataSettings
from ssm_train.data.order import (
    BLOCK,
    PackedOrder,
    PaddedOrder,
    accumulation_for,
    build_order,
    permute,
    round_keys,
)
from ssm_train.errors import InputError


def some_lengths(count: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.clip(draw.lognormal(3, 0.8, count), 2, 200).astype(np.int64)


def as_lists(parts) -> list[list[int]]:
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 4095, 4096, 70_001])
def test_permute_is_a_permutation_and_each_position_stands_alone(size):
    keys = round_keys(1, 2)
    whole = permute(np.arange(size), size, keys)
    assert sorted(whole.tolist()) == list(range(size))
    some = np.random.default_rng(0).integers(0, size, 20)
    assert permute(some, size, keys).tolist() == whole[some].tolist()


def test_permute_looks_random():
    """Every place equally often over many keys (chi square), and no neighbours kept."""
    size, draws = 6, 1200
    counts = np.zeros((size, size))
    for i in range(draws):
        counts[np.arange(size), permute(np.arange(size), size, round_keys(i))] += 1
    expected = draws / size
    assert ((counts - expected) ** 2 / expected).sum() < 60  # 25 degrees of freedom: p = 1e-4
    whole = permute(np.arange(50_000), 50_000, round_keys(3))
    assert abs(np.corrcoef(whole, np.arange(50_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(whole[1:], whole[:-1])[0, 1]) < 0.02


def test_permute_of_ten_million_needs_no_memory_of_them():
    places = permute(np.arange(9_990_000, 9_990_000 + BLOCK), 10_000_000, round_keys(0))
    assert len(set(places.tolist())) == BLOCK
    assert abs(places.mean() / 5e6 - 1) < 0.05


def test_permute_never_changes():
    """Resuming after an upgrade must see the same data: these figures may not move."""
    assert round_keys(42, 0)[:2].tolist() == KEYS
    assert permute(np.arange(8), 1000, round_keys(42, 0)).tolist() == PLACES


KEYS = [11465652750463011511, 15382171918060459190]
PLACES = [685, 693, 774, 403, 770, 782, 177, 940]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("count", "batch"), [(103, 4), (9000, 32), (6001, 3000), (7, 7)])
def test_every_example_once_an_epoch_but_the_remainder(grouped, count, batch):
    order = PaddedOrder(some_lengths(count), batch, seed=5, group_by_length=grouped)
    steps = order.steps_per_epoch
    assert steps == count // batch
    left_out = []
    for epoch in range(2):
        seen = np.concatenate([order.step_examples(epoch * steps + k) for k in range(steps)])
        assert len(seen) == len(set(seen.tolist())) == steps * batch
        left_out.append(set(range(count)) - set(seen.tolist()))
        assert len(left_out[-1]) == count % batch
    if 0 < count % batch < count / 2:
        assert left_out[0] != left_out[1]


@pytest.mark.parametrize("grouped", [True, False])
def test_a_step_is_the_same_on_every_cut(grouped):
    cuts = [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4), (1, 4, 1)]
    lengths = some_lengths(50)
    for step in (0, 7, 12, 30):
        steps = set()
        for batch, world, accumulation in cuts:
            order = PaddedOrder(lengths, batch, world, accumulation, 3, grouped)
            micro = order.micro_batches(step)
            assert [len(m) for m in micro] == [batch] * (world * accumulation)
            ranks = [order.rank_micro_batches(step, rank) for rank in range(world)]
            assert all(len(mine) == accumulation for mine in ranks)
            assert as_lists(micro) == as_lists(m for turn in zip(*ranks, strict=True) for m in turn)
            steps.add(tuple(np.concatenate(micro).tolist()))
        assert len(steps) == 1


def test_seek_equals_replay_and_seeds_and_epochs_differ():
    lengths = some_lengths(10_000)
    for make in (
        lambda seed: PaddedOrder(lengths, 8, 2, 2, seed),
        lambda seed: PackedOrder(lengths, 512, 2, 2, seed),
    ):
        replayed = make(1)
        steps = replayed.steps_per_epoch
        wanted = {k: as_lists(replayed.micro_batches(k)) for k in (0, 1, steps + 3, 2 * steps + 1)}
        for step, micro in wanted.items():
            assert as_lists(make(1).micro_batches(step)) == micro
            assert as_lists(make(2).micro_batches(step)) != micro
        assert wanted[1] != as_lists(replayed.micro_batches(steps + 1))


def test_grouping_by_length_saves_padding_and_shuffles_the_lengths():
    lengths = some_lengths(9000)

    def padding(order):
        real = padded = 0
        for step in range(order.steps_per_epoch):
            for micro in order.micro_batches(step):
                real += lengths[micro].sum()
                padded += len(micro) * lengths[micro].max()
        return 1 - real / padded

    grouped, plain = (PaddedOrder(lengths, 16, 1, 2, 0, g) for g in (True, False))
    assert padding(grouped) < 0.05 < 0.4 < padding(plain)
    longest = [lengths[grouped.step_examples(k)].max() for k in range(grouped.steps_per_epoch)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2


def test_data_smaller_than_a_step():
    """One step an epoch of all there is, in micro-batches that differ by one at most."""
    for grouped in (True, False):
        order = PaddedOrder(some_lengths(7), 2, 2, 2, 0, grouped)
        assert order.steps_per_epoch == 1
        for step in range(3):
            micro = order.micro_batches(step)
            assert sorted(np.concatenate(micro).tolist()) == list(range(7))
            assert [len(m) for m in micro] == [2, 2, 2, 1]
            mine = [*order.rank_micro_batches(step, 0), *order.rank_micro_batches(step, 1)]
            assert sum(map(len, mine)) == 7
    with pytest.raises(InputError, match=r"3 training examples are fewer than the micro-batches"):
        PaddedOrder(some_lengths(3), 2, 2, 2)
    with pytest.raises(InputError, match=r"has 30 tokens; .* more than 48 "):
        PackedOrder(np.array([10, 10, 10]), 16, 2, 2)


@pytest.mark.parametrize(("count", "tokens", "rows_per_step"), [(500, 256, 3), (6000, 2048, 4)])
def test_packed_rows_hold_every_example_once(count, tokens, rows_per_step):
    lengths = some_lengths(count)
    order = PackedOrder(lengths, tokens, accumulation=rows_per_step, seed=9)
    epoch, first = 0, 0
    for epoch in range(3):
        steps = order.steps_in_epoch(epoch)
        rows = [row for k in range(steps) for row in order.micro_batches(first + k)]
        assert order.locate(first) == (epoch, 0)
        assert order.locate(first + steps - 1) == (epoch, steps - 1)
        first += steps
        assert len(rows) == steps * rows_per_step
        filled = np.array([lengths[row].sum() for row in rows])
        assert filled.max() <= tokens
        assert all(len(row) for row in rows)
        seen = Counter(np.concatenate(rows).tolist())
        assert max(seen.values()) == 1
        # What is left out is less than a step, and the epoch's last row may be short.
        assert lengths.sum() - filled.sum() < rows_per_step * tokens
        # A row ends only where the next example does not fit.
        assert (filled[:-1] + lengths.max() > tokens).all()


def test_a_row_may_be_exactly_full():
    order = PackedOrder(np.array([8] * 6), 16)
    assert order.row_starts(0).tolist() == [0, 2, 4, 6]
    assert PackedOrder(np.array([16] * 3), 16).steps_per_epoch == 3


def test_packed_steps_are_the_same_on_every_cut():
    lengths = some_lengths(3000)
    steps = {
        tuple(map(tuple, as_lists(PackedOrder(lengths, 512, world, acc, 1).micro_batches(5))))
        for world, acc in ((4, 1), (2, 2), (1, 4))
    }
    assert len(steps) == 1
    order = PackedOrder(lengths, 512, 2, 2, 1)
    ranks = [as_lists(order.rank_micro_batches(5, rank)) for rank in range(2)]
    assert [row for turn in zip(*ranks, strict=True) for row in turn] == list(
        map(list, next(iter(steps)))
    )


def test_epochs_of_few_rows_still_fill_a_step():
    """However the rows fall in an epoch, there is at least one whole step in it."""
    lengths = np.array([9, 9, 5, 5, 5, 3, 3, 2, 2, 1])  # 44 tokens: at least 3 rows of 16
    order = PackedOrder(lengths, 16, accumulation=3)
    for step in range(60):
        assert len(order.micro_batches(step)) == 3


def test_settings_choose_the_order():
    settings = DataSettings(data="x", batch_size=2, seed=11, group_by_length=False)
    lengths = some_lengths(100)
    assert build_order(lengths, settings, 2, 3) == PaddedOrder(lengths, 2, 2, 3, 11, False)
    packed = build_order(lengths, settings.model_copy(update={"packing": True}), 1, 1)
    assert isinstance(packed, PackedOrder) and packed.tokens_per_batch == 16_384


def test_accumulation_keeps_the_global_batch():
    assert accumulation_for(16, 2, 4) == 2
    for world in (3, 16):
        with pytest.raises(InputError, match=f"16 is not a multiple of batch_size 2 x {world}"):
            accumulation_for(16, 2, world)
