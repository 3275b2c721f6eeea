"""Which channels and states of a layer train, which stay frozen, which are zeroed: how many of
each, the choice by how far a warm-up moved them, and its record as safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from safetensors.torch import save_file
from torch import Tensor

from ssm_train.errors import InputError
from ssm_train.settings import Settings

Share = int | float
"""A number of dimensions (int), or a fraction of them (float)."""


class Counts(Settings):
    """Numbers of channels and states."""

    channel: Share = Field(default=0, ge=0)
    """A whole number, or a fraction of all channels."""
    state: Share = Field(default=0, ge=0)
    """A whole number, or a fraction of a channel's states."""

    @field_validator("channel", "state")
    @classmethod
    def _at_most_all(cls, value: Share) -> Share:
        if isinstance(value, float) and value > 1:
            raise ValueError("a fraction is at most 1; numbers of dimensions are whole numbers")
        return value


@dataclass(frozen=True)
class Division:
    """How many of a dimension's indices train, are frozen, are zeroed."""

    train: int
    freeze: int
    zero: int


def divide(size: int, freeze: Share, zero: Share, what: str) -> Division:
    """`size` indices of `what`: fractions count as round(f * size), and the rest trains. Raises
    InputError where none is left."""
    frozen, zeroed = (round(x * size) if isinstance(x, float) else x for x in (freeze, zero))
    if frozen + zeroed >= size:
        raise InputError(
            f"of {size} {what} {frozen} are frozen (num_freeze {freeze}) and {zeroed} zeroed "
            f"(num_zero {zero}), so none is left to train; lower one of them"
        )
    return Division(size - frozen - zeroed, frozen, zeroed)


@dataclass(frozen=True)
class Choice:
    """The dimensions of one layer. Indices are in rising order."""

    score: Tensor  # [d] how far the warm-up moved each channel: squared, summed over its states
    channels: Tensor  # [C] int64, those that train (Mamba-2: heads)
    states: Tensor | None  # [C, S] int64, the states of each of them that train; None: no states
    zeroed: Tensor  # [Z] int64, channels without memory


@dataclass(frozen=True)
class Selection:
    """The choice of every layer, by the name of its mixer."""

    layers: dict[str, Choice] = field(default_factory=dict)

    def __str__(self) -> str:
        choice, count = next(iter(self.layers.values())), len(self.layers)
        states = "" if choice.states is None else f", {choice.states.shape[1]} states in each"
        return (
            f"chose {len(choice.channels)} of {len(choice.score)} channels in {count} "
            f"layer{'s' if count > 1 else ''}{states}; {len(choice.zeroed)} zeroed"
        )

    def tensors(self) -> dict[str, Tensor]:
        """`<mixer>.<score | channels | states | zeroed>` -> tensor on the CPU."""
        return {
            f"{name}.{key}": tensor.cpu().contiguous()
            for name, choice in self.layers.items()
            for key, tensor in vars(choice).items()
            if tensor is not None
        }

    def write(self, directory: Path, settings: Mapping[str, Any]) -> None:
        """`selection.safetensors` and, with the settings that it followed, `selection.json`."""
        save_file(self.tensors(), directory / "selection.safetensors")
        layers = {
            name: {
                key: tensor.tolist()
                for key, tensor in vars(choice).items()
                if tensor is not None and key != "score"
            }
            for name, choice in self.layers.items()
        }
        record = {"settings": dict(settings), "layers": layers}
        (directory / "selection.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def choose(moved: Tensor, channels: Division, states: Division | None) -> Choice:
    """The channels that moved most train, those that moved least are zeroed.

    moved [d, n]: squared movement of each state of each channel; n = 1 without states. In each
    channel that trains, so do the `states.train` states that moved most.
    """
    score = moved.sum(1)
    order = score.argsort(descending=True, stable=True)
    trained = order[: channels.train].sort().values
    chosen = None
    if states is not None:
        ranked = moved[trained].argsort(dim=1, descending=True, stable=True)
        chosen = ranked[:, : states.train].sort(1).values
    zeroed = order[channels.train + channels.freeze :].sort().values
    return Choice(score, trained, chosen, zeroed)


def undecided_indices(*shape: int, like: Tensor) -> Tensor:
    """int64 indices of this shape that are not chosen yet: -1."""
    return torch.full(shape, -1, dtype=torch.int64, device=like.device)
