"""What an engine does for the loop and for checkpoints: it knows how parameters, gradients and the
optimizer lie over processes, and nothing of models or schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Engine(Protocol):
    """One process's part. All methods but the properties are called by all ranks together."""

    name: str
    """Such as DDP or ZeRO-2, for the log."""
    device: torch.device
    scaler: Any
    """Of fp16, or None."""
    model: nn.Module
    """What the loop calls; there after `prepare`."""
    optimizer: Any
    """Its `param_groups` hold the learning rates; there after `prepare`."""
    notes: list[str]
    """For the log, after `prepare`."""
    place: str | None
    """Where this process makes the weights of a model that none needs whole, "cpu" on rank 0 and
    "meta" elsewhere (`adapters.base.ModelSpec.place`); None: on `device`, all of them."""
    keeps_gradients: bool
    """Whether `step` can leave gradients where they are, as CUDA graphs need it."""
    copies_state: bool
    """Whether `trained` and `optimizer_state` give copies, on the CPU of rank 0 and nothing on
    other ranks; else every rank gets the tensors that training changes."""
    shards_weights: bool
    """Whether a process holds a part of the weights only, so that each forward is collective."""

    def spread(self, bare: nn.Module) -> nn.Module:
        """A model to prove `bare` by before `prepare` has it, on `device`. Where a process makes
        its weights in `place`, no process holds all of them in it."""

    def prepare(self, bare: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Lays the model over the processes. `bare` is changed; it is on `device`, or went through
        `spread`."""

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; `last`: of the optimizer step."""

    def backward(self, loss: Tensor) -> None:
        """Adds gradients. Over processes they are averaged, at the latest in `step`."""

    def step(self, max_norm: float, keep_gradients: bool = False) -> Tensor:
        """Clips to the norm (infinite: not at all), lets the optimizer step unless a gradient is
        not finite, and forgets gradients. Returns their norm [] before clipping, the same on all
        ranks, not finite where the step was skipped. `keep_gradients`: zeros stay in their place.
        """

    def whole(self) -> AbstractContextManager[nn.Module]:
        """The model with all its weights on the device of every process, to evaluate it; what is
        changed in it is lost."""

    def for_writing(self) -> AbstractContextManager[nn.Module | None]:
        """The same on rank 0, where it may be on the CPU; on other ranks there may be none."""

    def trained(self) -> dict[str, Tensor]:
        """The trained parameters by name, whole; fp32 as they are stored. See `copies_state`."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """`<parameter name>.<exp_avg | exp_avg_sq | step>`, whole."""

    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `trained` gave, whichever engine that was. Raises InputError where names
        or shapes are others."""

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `optimizer_state` gave."""

    def free(self) -> nn.Module:
        """Forgets optimizer and engine. Returns the model with all its weights, for another
        `prepare`; it need not be the one that was given."""
