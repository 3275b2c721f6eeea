"""The preflight that no run starts without: every trainable tensor gets a gradient from real data.
A matrix that a kernel reads past its module would otherwise train in vain, silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ssm_train.adapters.base import Batch, TokenLosses
from ssm_train.errors import InputError
from ssm_train.parts import find_zeros, like, local, take_norms

NOISE = 0.02
"""Standard deviation of what stands in for zeros, as large as a common initialisation."""


def check_liveness(
    model: nn.Module,
    batch: Batch,
    token_losses: TokenLosses,
    may_be_idle: Sequence[str] = (),
    *,
    reduce_max: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """One forward and backward in train mode; the model, its gradients and the RNG stay as they
    were, bit for bit.

    Tensors that are all zero (lora_B at the start) hold small noise meanwhile: behind a zero
    factor the other factor has no gradient. `may_be_idle`: name parts or patterns of parameters
    that a batch may miss, such as experts. `reduce_max` takes the gradient norms [P] fp32 of this
    rank and returns their maximum over ranks, so that all ranks agree. Raises InputError naming the
    modules without a finite non-zero gradient.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise InputError("nothing to train: no parameter of the model requires a gradient")
    with unchanged(model, training=True):
        fill_zeros(trainable)
        with torch.enable_grad():
            loss = token_losses(model, batch).loss
            if loss.requires_grad:
                loss.backward()
            loss = loss.detach()
        norms = take_norms(trainable.values())
    norms = torch.where(norms.isfinite(), norms, torch.inf)
    if reduce_max is not None:
        norms = reduce_max(norms)
    problems = {
        name: norm
        for name, norm in zip(trainable, norms.tolist(), strict=True)
        if (norm == 0 or norm == float("inf")) and not _is_idle(name, may_be_idle)
    }
    if problems:
        raise InputError(_report(problems, len(trainable), float(loss), batch.num_targets))


@contextmanager
def unchanged(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or evaluation mode inside; afterwards modes, zero tensors, buffers, gradients and RNG
    as before."""
    modes = {module: module.training for module in model.modules()}
    gradients = {p: p.grad for p in model.parameters()}
    zeros = find_zeros(p for p in model.parameters() if p.requires_grad)
    buffers = {b: b.detach().clone() for b in model.buffers()}
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            model.train(training)
            for parameter in gradients:
                parameter.grad = None
            yield
        finally:
            with torch.no_grad():
                for parameter in zeros:
                    local(parameter).zero_()
                for buffer, before in buffers.items():
                    buffer.copy_(before)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for module, training in modes.items():
                module.training = training


def fill_zeros(trainable: dict[str, nn.Parameter]) -> None:
    """Small noise in place of tensors that are all zero."""
    # A generator of its own: the same noise on every rank, whatever was drawn before.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in find_zeros(trainable.values()):
            noise = torch.randn(parameter.shape, generator=generator) * NOISE
            local(parameter).copy_(local(like(parameter, noise)))


def _is_idle(name: str, may_be_idle: Sequence[str]) -> bool:
    parts = name.split(".")
    return any(pattern in parts or fnmatchcase(name, pattern) for pattern in may_be_idle)


def _report(problems: dict[str, float], total: int, loss: float, num_targets: int) -> str:
    if num_targets == 0:
        return "the first batch has no supervised token, so nothing would train; check the data"
    places: dict[str, set[str]] = {}
    for name in problems:
        module, factor = _split(name)
        places.setdefault(module, set()).add(factor)
    named = _count_layers({f"{module} ({', '.join(sorted(f))})" for module, f in places.items()})
    not_finite = sum(norm == float("inf") for norm in problems.values())
    if not_finite:
        return (
            f"{not_finite} of {total} trainable tensors get gradients that are not finite (loss "
            f"{loss:.4g}): {named}. Check prec and learning from these weights, or report it"
        )
    read_past = any(factor.startswith(("lora_", "weight")) for f in places.values() for factor in f)
    reason = (
        "the forward reads the layer's weight directly (a fused kernel, or a stock mixer) and "
        "never calls the module"
        if read_past
        else "the forward does not use them"
    )
    return (
        f"{len(problems)} of {total} trainable tensors get no gradient and would train in vain: "
        f"{named}. Most likely {reason}; load the model through an adapter of this package, or "
        "leave these modules out"
    )


def _split(name: str) -> tuple[str, str]:
    """A parameter's name as its module (without PEFT's prefix) and its part in there."""
    name = re.sub(r"^(module\.)?(base_model\.model\.)?", "", name)
    match = re.fullmatch(r"(.+?)\.(lora_\w+)(\..+)?", name)
    if match:
        return match[1], match[2]
    module, _, last = name.rpartition(".")
    return module or name, last


def _count_layers(names: set[str]) -> str:
    """Names joined, those that differ only in the layer number as one with `*` and a count."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    return ", ".join(
        group[0] if len(group) == 1 else f"{pattern} in {len(group)} layers"
        for pattern, group in groups.items()
    )
