"""One process, or DDP through Accelerate: each process has all weights and the whole optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ssm_train import snapshot
from ssm_train.engines.base import MakeOptimizer


class Replicated:
    """See `engines.base.Engine`."""

    place: str | None = None
    shards_weights, keeps_gradients = False, True
    model: nn.Module
    optimizer: Any

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.name = "DDP" if accelerator.num_processes > 1 else "1 process"
        self.device: torch.device = accelerator.device
        self.scaler = accelerator.scaler
        self.notes: list[str] = []

    def spread(self, bare: nn.Module) -> nn.Module:
        return bare

    def prepare(self, bare: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.bare = bare
        self.own_optimizer = make_optimizer(bare)
        self.model, self.optimizer = self.accelerator.prepare(bare, self.own_optimizer)
        self.parameters = [p for p in bare.parameters() if p.requires_grad]

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients cross processes with the last micro-batch only."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self, max_norm: float, keep_gradients: bool = False) -> Tensor:
        norm = self.accelerator.clip_grad_norm_(self.parameters, max_norm)
        if self.scaler is None:
            # Fused AdamW leaves parameters, moments and its step count alone where found_inf is 1:
            # the skip happens on the device.
            self.own_optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not keep_gradients)
        return norm

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        yield self.bare

    def trained(self) -> dict[str, Tensor]:
        return snapshot.trainable_tensors(self.bare)

    def optimizer_state(self) -> dict[str, Tensor]:
        return snapshot.optimizer_tensors(self.own_optimizer, self.bare.named_parameters())

    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        snapshot.load_parameters(self.bare, tensors)

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        snapshot.load_optimizer_tensors(self.own_optimizer, tensors, self.bare.named_parameters())

    def free(self) -> nn.Module:
        self.accelerator.free_memory()
        return self.bare
