"""Where NaN or infinity comes from: a forward pass in which every module's output is looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssm_train import distributed
from ssm_train.adapters.base import Batch


def find_not_finite(
    model: nn.Module, batches: Iterable[Batch], loss_of: Callable[[Batch], Tensor]
) -> str:
    """All ranks, as a forward may be collective. In words, which module of `model` is the first
    whose output is not finite in the forward passes of `batches`; inner modules come before those
    that hold them. For the end of a run: it waits for the device at every module."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            if not found and not all(tensor.isfinite().all() for tensor in tensors_in(output)):
                found.append(f"the first output that is not finite is that of {name}")

        return look

    hooks = [
        module.register_forward_hook(watch(name.removeprefix("module.") or "the model"))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            losses = [float(loss_of(batch)) for batch in batches]
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not all(map(math.isfinite, losses)):
        found.append("every module's output is finite, but the loss is not")
    everywhere = distributed.gather_objects(found[:1])
    nothing = "every module's output and the loss are finite, so a gradient is not, or losses are 0"
    return everywhere[0] if everywhere else nothing


def tensors_in(output: Any) -> list[Tensor]:
    """The floating point tensors of a module's output, however it holds them."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [tensor for part in output for tensor in tensors_in(part)]
    return []
