"""Which examples make optimizer step k: a pure function of (seed, epoch, k, global batch).

Ranks and micro-batches only slice it. Resuming is a seek; nothing is replayed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssm_train.errors import InputError

BLOCK = 4_096  # permuted examples that are sorted by length together

Indices = NDArray[np.int64]
Keys = NDArray[np.uint64]

ROUNDS = 6


def round_keys(*entropy: int) -> Keys:
    """[ROUNDS] keys of a permutation, from numbers such as seed and epoch."""
    state = np.random.SeedSequence(entropy).generate_state(ROUNDS, np.uint64)
    return state.astype(np.uint64)


def permute(positions: Indices, size: int, keys: Keys) -> Indices:
    """Where a pseudo-random permutation of range(size) takes each of `positions`.

    A balanced Feistel network on the next power of four, walked until back in range (Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). No memory, any position at once.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        moving = values[outside]
        left, right = moving >> half, moving & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(x: Keys) -> Keys:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass
class PaddedOrder:
    """Steps of `batch_size * world * accumulation` examples, every example once an epoch, the
    remainder left out (another one each epoch). Data that is smaller than that is one step.

    Raises InputError when not every micro-batch of it would have an example.
    """

    lengths: Indices  # [N] tokens
    batch_size: int
    world: int = 1
    accumulation: int = 1
    seed: int = 0
    group_by_length: bool = True
    _block: tuple[int, int, Indices] | None = field(default=None, compare=False)
    """The block last sorted: epoch, number, examples."""

    def __post_init__(self) -> None:
        if len(self.lengths) < self.world * self.accumulation:
            raise InputError(
                f"{len(self.lengths)} training examples are fewer than the micro-batches of one "
                f"optimizer step ({self.world} processes x gradient_accumulation_steps "
                f"{self.accumulation}); lower gradient_accumulation_steps"
            )

    @property
    def global_batch(self) -> int:
        """Examples of one optimizer step."""
        return min(self.batch_size * self.world * self.accumulation, len(self.lengths))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.lengths) // self.global_batch

    def step_examples(self, step: int) -> Indices:
        """[global batch] examples of optimizer step `step` (0-based, all epochs counted)."""
        epoch, step = divmod(step, self.steps_per_epoch)
        size = len(self.lengths)
        keys = round_keys(self.seed, epoch)
        if not self.group_by_length:
            start = step * self.global_batch
            return permute(np.arange(start, start + self.global_batch), size, keys)
        steps_per_block = max(1, BLOCK // self.global_batch)
        block, step = divmod(step, steps_per_block)
        examples = self._sorted_block(epoch, block, steps_per_block)
        # The steps of a block change places, so that lengths come in no order.
        steps_here = len(examples) // self.global_batch
        swaps = round_keys(self.seed, epoch, 1 + block)
        place = int(permute(np.array([step]), steps_here, swaps)[0])
        return examples[place * self.global_batch : (place + 1) * self.global_batch]

    def _sorted_block(self, epoch: int, block: int, steps_per_block: int) -> Indices:
        """The permuted examples of some whole steps, by length."""
        if self._block is None or self._block[:2] != (epoch, block):
            last = min((block + 1) * steps_per_block, self.steps_per_epoch)
            first = block * steps_per_block * self.global_batch
            places = np.arange(first, last * self.global_batch)
            examples = permute(places, len(self.lengths), round_keys(self.seed, epoch))
            examples = examples[np.argsort(self.lengths[examples], kind="stable")]
            self._block = epoch, block, examples
        return self._block[2]

    def micro_batches(self, step: int) -> list[Indices]:
        """[accumulation x world] micro-batches; number a * world + r is rank r's a-th."""
        return np.array_split(self.step_examples(step), self.world * self.accumulation)

    def rank_micro_batches(self, step: int, rank: int) -> list[Indices]:
        """The micro-batches of one rank, in time order."""
        return self.micro_batches(step)[rank :: self.world]


@dataclass
class PackedOrder:
    """Steps of `world * accumulation` rows of at most `tokens_per_batch` tokens.

    The permuted examples of an epoch fill rows one after the other; a row ends where the next
    example does not fit (98 to 99 % full at 16,384 tokens and usual lengths). The plan of an
    epoch is one integer a row. Raises InputError when the data is smaller than one step; no
    example may be longer than a row.
    """

    lengths: Indices  # [N] tokens
    tokens_per_batch: int
    world: int = 1
    accumulation: int = 1
    seed: int = 0
    _epoch_ends: list[int] = field(default_factory=list)  # optimizer steps up to each epoch's end
    _plan: tuple[int, Indices] | None = None  # epoch, first example of each row

    def __post_init__(self) -> None:
        assert self.lengths.max() <= self.tokens_per_batch, "drop longer examples first"
        tokens = int(self.lengths.sum())
        if tokens <= (self.rows_per_step - 1) * self.tokens_per_batch:
            raise InputError(
                f"the training data has {tokens} tokens; one optimizer step packs more than "
                f"{(self.rows_per_step - 1) * self.tokens_per_batch} (tokens_per_batch "
                f"{self.tokens_per_batch} x {self.world} processes x gradient_accumulation_steps "
                f"{self.accumulation}); lower tokens_per_batch"
            )

    @property
    def rows_per_step(self) -> int:
        return self.world * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Of the first epoch; the others differ by little (see `locate`)."""
        return self.steps_in_epoch(0)

    def steps_in_epoch(self, epoch: int) -> int:
        # At least one: every plan has at least tokens / tokens_per_batch rows.
        return (len(self.row_starts(epoch)) - 1) // self.rows_per_step

    def row_starts(self, epoch: int) -> Indices:
        """[rows + 1] places in the epoch's permutation where rows begin, and the end."""
        if self._plan is None or self._plan[0] != epoch:
            ends = np.cumsum(self.lengths[self._permuted(0, len(self.lengths), epoch)])
            starts = [0]
            while starts[-1] < len(ends):
                before = ends[starts[-1] - 1] if starts[-1] else 0
                starts.append(int(ends.searchsorted(before + self.tokens_per_batch, "right")))
            self._plan = epoch, np.array(starts)
        return self._plan[1]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step in it) of optimizer step `step`."""
        while not self._epoch_ends or self._epoch_ends[-1] <= step:
            steps = self.steps_in_epoch(len(self._epoch_ends))
            self._epoch_ends.append((self._epoch_ends or [0])[-1] + steps)
        epoch = int(np.searchsorted(self._epoch_ends, step, side="right"))
        return epoch, step - (self._epoch_ends[epoch - 1] if epoch else 0)

    def micro_batches(self, step: int) -> list[Indices]:
        """[accumulation x world] rows of examples; number a * world + r is rank r's a-th."""
        epoch, step = self.locate(step)
        first = step * self.rows_per_step
        starts = self.row_starts(epoch)[first : first + self.rows_per_step + 1]
        return [self._permuted(start, end, epoch) for start, end in pairwise(starts.tolist())]

    def rank_micro_batches(self, step: int, rank: int) -> list[Indices]:
        """The rows of one rank, in time order."""
        return self.micro_batches(step)[rank :: self.world]

    def _permuted(self, start: int, end: int, epoch: int) -> Indices:
        keys = round_keys(self.seed, epoch)
        return permute(np.arange(start, end), len(self.lengths), keys)


Order = PaddedOrder | PackedOrder


def build_order(lengths: Indices, settings: Any, world: int, accumulation: int) -> Order:
    """The order that the data settings ask for."""
    if settings.packing:
        return PackedOrder(lengths, settings.row_tokens, world, accumulation, settings.seed)
    return PaddedOrder(
        lengths,
        settings.batch_size,
        world,
        accumulation,
        settings.seed,
        settings.group_by_length,
    )


def accumulation_for(global_batch: int, batch_size: int, world: int) -> int:
    """Micro-batches a step that keep the global batch on `world` processes.

    For packed rows `batch_size` is 1 and `global_batch` counts rows. Raises InputError when it
    does not divide.
    """
    accumulation, rest = divmod(global_batch, batch_size * world)
    if rest or not accumulation:
        raise InputError(
            f"the global batch of {global_batch} is not a multiple of batch_size {batch_size} x "
            f"{world} processes; choose a batch_size that divides it"
        )
    return accumulation
