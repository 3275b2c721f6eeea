"""LoRA-GA (arXiv 2407.05000): which gradient is taken, which of its singular vectors A and B start
from, how long they are, and how the base weight gives way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssm_train.adapters.base import Batch, TokenLosses
from ssm_train.errors import InputError
from ssm_train.peft.targets import match_targets, rank_of

if TYPE_CHECKING:
    from ssm_train.peft.lora import LoraSettings

FULL_SVD = 512
"""Smaller side of a gradient up to which all of its singular vectors are computed."""
SKETCH_ITERATIONS = 8
"""Power iterations of the randomised SVD above that."""


def check_ranks(model: nn.Module, targets: list[str] | str, settings: LoraSettings) -> None:
    """Raises InputError for a target with fewer than 2r singular vectors: B takes r+1 to 2r."""
    if settings.direction == "legacy":
        return
    modules: dict[str, Any] = dict(model.named_modules())
    for name in sum(match_targets(model, targets, settings).values(), []):
        out_features, in_features = modules[name].weight.shape
        rank, largest = rank_of(name, settings), min(out_features, in_features) // 2
        if rank > largest:
            last = name.rpartition(".")[2]
            way_out = (
                f'add rank_pattern {{"{last}": {largest}}}' if largest else f"leave {last} out"
            )
            raise InputError(
                f"init_lora_weights lora_ga takes 2r = {2 * rank} singular vectors, but {name} is "
                f'{out_features} x {in_features}; {way_out}, or set "direction": "legacy"'
            )


def start_along_gradients(
    layers: Mapping[str, Any],
    model: nn.Module,
    batches: Iterable[Batch],
    token_losses: TokenLosses,
    settings: LoraSettings,
) -> None:
    """Sets A, B and the base weight of PEFT's LoRA layers; the model's function stays the same.

    `layers`: by module name, as injected (B = 0). `batches`: of one example each; the first
    loraga_steps * loraga_batch_size count. A layer without a gradient keeps its plain start, and
    the liveness preflight judges it. Raises InputError for a gradient that is not finite.

    PEFT's own lora_ga differs: it multiplies B by its singular values (the paper's algorithm 1 has
    none) and sizes it by the matrix, where here scaling * |B A|_F = sqrt(loraga_stable_c).
    """
    examples = list(islice(batches, settings.loraga_steps * settings.loraga_batch_size))
    parts = split_by_layer(layers) if settings.loraga_layerwise else [list(layers)]
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    for names in parts:
        weights = {name: layers[name].get_base_layer().weight for name in names}
        for name, gradient in mean_gradients(model, weights, examples, token_losses).items():
            if not gradient.isfinite().all():
                raise InputError(
                    f"init_lora_weights lora_ga: the gradient of {name} is not finite; check the "
                    "data and the base model, or set prec: bf16 or fp32"
                )
            if gradient.any():
                starts[name] = find_factors(gradient, layers[name], settings)
    for name, factors in starts.items():  # only now: layer by layer sees the base of one pass
        _set_start(layers[name], *factors)


def mean_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    token_losses: TokenLosses,
) -> dict[str, Tensor]:
    """Gradients [out, in] fp32 of the loss per supervised token of all `batches`, by name.

    Dropout is off. Which parameters train, their gradients, and modes stay as they were.
    """
    totals = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    num_targets = 0
    with _only_requiring(model, list(weights.values())), torch.enable_grad():
        for batch in batches:
            device = next(iter(weights.values())).device
            losses = token_losses(model, batch.to(device))
            num_targets += losses.num_targets
            if not losses.loss.requires_grad:
                continue
            # Of the sum, as gradients of the mean would vanish in fp16.
            gradients = torch.autograd.grad(losses.loss, list(weights.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient
    return {name: total / max(1, num_targets) for name, total in totals.items()}


def find_factors(gradient: Tensor, layer: Any, settings: LoraSettings) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], fp32, from the singular vectors of a gradient [out, in].

    ArB2r (theorem 3.1, algorithm 1): A from right vectors 1 to r, B from left vectors r+1 to 2r,
    equally long, so that one step moves B A by the gradient's best part of rank 2r. legacy: A the
    right vectors 1 to r, B the left ones times their singular values, up to one factor.
    """
    r, scaling = layer.r["default"], layer.scaling["default"]
    U, S, Vh = singular_vectors(gradient, 2 * r)
    norm = math.sqrt(settings.loraga_stable_c) / scaling  # of B A, Frobenius
    if settings.direction == "legacy":
        return Vh[:r], U[:, :r] * S[:r] * (norm / S[:r].norm())
    size = math.sqrt(norm / math.sqrt(r))  # |U Vh|_F of r pairs is sqrt(r)
    return size * Vh[:r], size * U[:, r : 2 * r]


def singular_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U [m, k], S [k], Vh [k, n]) with k >= min(count, m, n), the largest first; of a large
    matrix by a randomised SVD, the same at every call. The random states stay as they were."""
    smaller = min(matrix.shape)
    if smaller <= FULL_SVD:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U, S, Vh
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        sketch = min(2 * count + 8, smaller)
        U, S, V = torch.svd_lowrank(matrix, q=sketch, niter=SKETCH_ITERATIONS)
    return U, S, V.mH


def split_by_layer(names: Iterable[str]) -> list[list[str]]:
    """Module names, in their order, by the layer they are in; those in none are one part."""

    def layer_of(name: str) -> str:
        found = re.match(r".*?\.\d+\.", name)
        return found[0] if found else ""

    return [list(part) for _, part in groupby(names, key=layer_of)]


@torch.no_grad()
def _set_start(layer: Any, A: Tensor, B: Tensor) -> None:
    weight = layer.get_base_layer().weight
    layer.lora_A["default"].weight.copy_(A)
    layer.lora_B["default"].weight.copy_(B)
    weight.copy_(weight.float() - layer.scaling["default"] * (B @ A))


@contextmanager
def _only_requiring(model: nn.Module, weights: Collection[nn.Parameter]) -> Iterator[None]:
    """Inside, only `weights` require gradients and nothing drops out; layers that recompute their
    activations still do, which they only do in train mode."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for module in modes:
            recomputes = (
                getattr(module, n, False) for n in ("gradient_checkpointing", "recompute")
            )
            module.training = any(recomputes)
        yield
    finally:
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)
        for module, training in modes.items():
            module.training = training
