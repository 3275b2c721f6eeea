"""CUDA graphs of forward and backward: what launching thousands of kernels costs is paid once a
shape. Packed rows have few shapes once their lists are padded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_train.adapters.base import Batch
from ssm_train.loss import IGNORED
from ssm_train.recording import NotRecorded, record

DOCUMENTS = 32  # the number of documents is padded to a multiple of it
TARGETS = 8  # the number of targets to a multiple of this part of the row

Gradients = Callable[[Batch, Tensor], Tensor]
"""(batch, scale []) -> the batch's loss [], after adding scale times its gradient to `p.grad`."""


def obstacle(
    device: torch.device, packing: bool, prec: str, gradient_checkpointing: bool
) -> str | None:
    """Why a run cannot record graphs; None where it can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if not packing:
        return "without `packing: true` every batch has another shape"
    if prec == "fp16":
        return "with prec fp16 the loss scale is read on the host"
    if gradient_checkpointing:
        return "gradient_checkpointing keeps the state of the random numbers on the host"
    return None


class GradientGraphs:
    """`gradients` as a graph for each shape: the first batch of a shape runs as it is, the second
    one is recorded, later ones are replayed. Gradients are added to buffers that stay.

    All graphs share what one of them needs for activations, and keep it: it is given back before
    what needs as much (`drop`).
    """

    off = False
    """Whether a recording failed: then every batch runs as it is."""

    def __init__(self, gradients: Gradients, parameters: Sequence[nn.Parameter]) -> None:
        self.gradients, self.parameters = gradients, parameters
        self.recorded: dict[tuple[int, ...], Recording | None] = {}
        self.pool: Any = None
        self.held = 0  # bytes of the pool

    def __call__(self, batch: Batch, scale: Tensor) -> Tensor:
        """As `gradients`; the batch is packed and on the GPU."""
        self._keep_buffers()
        batch = pad(batch)
        assert batch.cu_seqlens is not None
        shape = batch.input_ids.numel(), batch.cu_seqlens.numel(), batch.targets.numel()
        if self.off or shape not in self.recorded:
            if self.held and unused_memory() - self.held < self.held:
                self.drop()
            self.recorded[shape] = None
            return self.gradients(batch, scale)
        recording = self.recorded[shape] or self._record(batch, scale)
        if recording is None:
            return self.gradients(batch, scale)
        self.recorded[shape] = recording
        return recording.replay(batch, scale)

    def drop(self) -> None:
        """Gives back the memory of all graphs. The next batch of each shape is recorded again."""
        self.recorded = dict.fromkeys(self.recorded)
        self.pool, self.held = None, 0
        torch.cuda.empty_cache()

    def _record(self, batch: Batch, scale: Tensor) -> Recording | None:
        """None, and a warning, where something in the model cannot be recorded."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        recording, reason = None, ""
        try:
            recording = Recording(self.gradients, batch, scale, self.pool)
        except NotRecorded as error:  # which keeps what was made inside, so it ends here
            reason = str(error)
        if recording is None:
            self.off = True
            self.drop()
            warnings.warn(
                f"no CUDA graphs, kernels are launched one by one: {reason}", stacklevel=2
            )
            return None
        self.held += torch.cuda.memory_reserved() - before
        return recording

    def _keep_buffers(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


class Recording:
    """A graph and the tensors that it reads."""

    def __init__(self, gradients: Gradients, batch: Batch, scale: Tensor, pool: Any) -> None:
        own: dict[str, Any] = {name: tensor.clone() for name, tensor in tensors(batch).items()}
        self.batch = replace(batch, **own)
        self.scale = scale.clone()
        with record(batch.input_ids.device, pool=pool) as self.graph:
            self.loss = gradients(self.batch, self.scale)

    def replay(self, batch: Batch, scale: Tensor) -> Tensor:
        own, given = tensors(self.batch), tensors(batch)
        torch._foreach_copy_([*own.values(), self.scale], [*(given[name] for name in own), scale])
        self.graph.replay()
        return self.loss.clone()


def unused_memory() -> int:
    """Bytes that no tensor is in, those inside of a graph among them."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def tensors(batch: Batch) -> dict[str, Tensor]:
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def pad(batch: Batch) -> Batch:
    """The same packed batch with lists of few lengths: empty documents at the end of the row, and
    targets that do not count."""
    assert batch.cu_seqlens is not None, "graphs are for packed batches"
    ends = fill(batch.cu_seqlens, DOCUMENTS, int(batch.input_ids.numel()), extra=1)
    step = -(-batch.input_ids.numel() // TARGETS)
    return replace(
        batch,
        cu_seqlens=ends,
        target_positions=fill(batch.target_positions, step, 0),
        targets=fill(batch.targets, step, IGNORED),
    )


def fill(x: Tensor, multiple: int, value: int, extra: int = 0) -> Tensor:
    """x [n] with `value` at the end, as many as make n - `extra` a multiple."""
    return F.pad(x, (0, -(x.numel() - extra) % multiple), value=value)
