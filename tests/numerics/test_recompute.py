"""Recomputing parts of the layers keeps less between the passes and changes no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_train.adapters import registry
from ssm_train.adapters.base import ModelSpec
from ssm_train.errors import InputError

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 61}
MODELS: dict[str, dict[str, Any]] = {
    "gla": {"model_type": "gla", "hidden_size": 64, "num_heads": 2, "intermediate_size": 96},
    "mamba": {"model_type": "mamba", "hidden_size": 32, "state_size": 8},
    "mamba2": {
        "model_type": "mamba2", "hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1,
        "state_size": 16,
    },
}  # fmt: skip


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Of all tensors that are kept for the backward pass, each memory once."""
    kept: dict[int, int] = {}
    total = [0]

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        total[0] = sum(kept.values())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield total


def train_once(family: str, recompute: Any) -> tuple[int, list[Tensor]]:
    torch.manual_seed(0)
    config = MODELS[family] | SPECIAL | {"num_hidden_layers": 2}
    spec = ModelSpec(new_model=config, gradient_checkpointing=recompute)
    model: Any = registry.resolve(spec)[0].prepare(spec).model.train()
    ids = torch.arange(3, 43)[None] % 61
    with counted_bytes() as total:
        loss = model(ids, labels=ids, use_cache=False).loss
    kept = total[0]
    loss.backward()
    return kept, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("family", "parts"),
    [("gla", ("mlp", "mixer", True)), ("mamba", ("mixer", True)), ("mamba2", ("mixer", True))],
)
def test_less_is_kept_and_gradients_are_the_same(family: str, parts: tuple[Any, ...]) -> None:
    everything, expected = train_once(family, False)
    for part in parts:
        kept, found = train_once(family, part)
        assert kept < 0.8 * everything, part
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_part_that_is_not_there_is_said() -> None:
    with pytest.raises(InputError, match="no part of that kind; use mixer or true"):
        train_once("mamba", "mlp")
