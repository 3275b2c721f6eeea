"""One process, or data parallel: each process has all weights and the whole optimizer.

Gradients are averaged after the last backward pass of a step, so that forward and backward can be
CUDA graphs. Only between hosts, and where all weights train, does that take longer than graphs
save: there gradients cross while the backward pass goes on, by PyTorch's DDP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssm_train import distributed, snapshot
from ssm_train.engines.base import MakeOptimizer

LARGE = 1_000_000  # elements of what crosses by itself
BUCKET = 50_000_000  # elements of small ones that cross together


class Replicated:
    """See `engines.base.Engine`."""

    place: str | None = None
    shards_weights, copies_state = False, False
    model: nn.Module
    optimizer: Any

    def __init__(self, accelerator: Any, trains_all: bool = False) -> None:
        self.accelerator = accelerator
        world = accelerator.num_processes
        self.overlaps = trains_all and world > distributed.processes_of_host()
        self.averages = not self.overlaps and world > 1
        self.keeps_gradients = not self.overlaps
        self.name = "DDP" if accelerator.num_processes > 1 else "1 process"
        self.device: torch.device = accelerator.device
        self.scaler = accelerator.scaler
        self.notes: list[str] = []

    def spread(self, bare: nn.Module) -> nn.Module:
        return bare

    def prepare(self, bare: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.bare = bare
        self.own_optimizer = make_optimizer(bare)
        self.optimizer = self.accelerator.prepare(self.own_optimizer)
        self.model = self.accelerator.prepare(bare) if self.overlaps else bare
        self.parameters = [p for p in bare.parameters() if p.requires_grad]
        if self.averages:  # as DDP does: all begin as rank 0
            for tensor in (*self.parameters, *bare.buffers()):
                dist.broadcast(tensor.data, 0)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients cross processes with the last micro-batch only."""
        hold_back = self.overlaps and not last
        return self.accelerator.no_sync(self.model) if hold_back else nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self, max_norm: float, keep_gradients: bool = False) -> Tensor:
        if self.averages:
            average(self.parameters)
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

    for_writing = whole

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


def average(parameters: Iterable[nn.Parameter]) -> None:
    """All ranks. Gradients become their mean over ranks, where they lie."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:  # this rank's batch did not reach it, another's may have
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    under_way = []
    for some in in_buckets(gradients):
        alone = len(some) == 1 and some[0].is_contiguous()
        flat = some[0] if alone else torch.cat([gradient.flatten() for gradient in some])
        under_way.append((dist.all_reduce(flat, async_op=True), flat, some))
    for work, flat, some in under_way:
        work.wait()
        flat /= dist.get_world_size()
        if flat is not some[0]:
            parts = flat.split([gradient.numel() for gradient in some])
            torch._foreach_copy_(some, [p.view_as(g) for p, g in zip(parts, some, strict=True)])


def in_buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Large ones alone, small ones together."""
    small: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if tensor.numel() >= LARGE:
            yield [tensor]
            continue
        small.append(tensor)
        size += tensor.numel()
        if size >= BUCKET:
            yield small
            small, size = [], 0
    if small:
        yield small
