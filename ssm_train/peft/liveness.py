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

NOISE = 0.02
"""Standard deviation of what stands in for zeros, as large as a common initialisation."""


def check_liveness(
    model: nn.Module,
    batch: Batch,
    token_losses: TokenLosses,
    may_be_idle: Sequence[str] = (),
    *,
    reduce_max: Callable[[Tensor], Tensor] | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> None:
    """One forward and backward in train mode; the model, its gradients and the RNG stay as they
    were, bit for bit.

    Tensors that are all zero (lora_B at the start) hold small noise meanwhile: behind a zero
    factor the other factor has no gradient. `may_be_idle`: name parts or patterns of parameters
    that a batch may miss, such as experts. `reduce_max` takes the gradient norms [P] fp32 of this
    rank and returns their maximum over ranks, so that all ranks agree. `backward` is the engine's
    own where there is one. Raises InputError naming the modules without a finite non-zero gradient.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise InputError("nothing to train: no parameter of the model requires a gradient")
    with unchanged(model, training=True):
        fill_zeros(trainable)
        loss, norms = _gradient_norms(model, batch, token_losses, trainable, backward)
    if reduce_max is not None:
        norms = reduce_max(norms)
    problems = {
        name: norm
        for name, norm in zip(trainable, norms.tolist(), strict=True)
        if (norm == 0 or norm == float("inf")) and not _is_idle(name, may_be_idle)
    }
    if problems:
        raise InputError(_report(problems, len(trainable), loss, batch.num_targets))


def _gradient_norms(
    model: nn.Module,
    batch: Batch,
    token_losses: TokenLosses,
    trainable: dict[str, nn.Parameter],
    backward: Callable[[Tensor], object],
) -> tuple[float, Tensor]:
    """The loss, and each tensor's gradient norm [P] fp32: 0 without one, inf if not finite.

    Seen by hooks, because an engine that shards gradients leaves `p.grad` empty.
    """
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[Tensor], None]:
        def record(gradient: Tensor) -> None:
            norm = gradient.detach().float().norm()
            norm = torch.where(norm.isfinite(), norm, torch.inf)
            seen[name] = torch.maximum(seen[name], norm) if name in seen else norm

        return record

    hooks = [parameter.register_hook(watch(name)) for name, parameter in trainable.items()]
    try:
        with torch.enable_grad():
            loss = token_losses(model, batch).loss
            if loss.requires_grad:
                backward(loss)
    finally:
        for hook in hooks:
            hook.remove()
    device = loss.device
    norms = [seen[name].to(device) if name in seen else loss.new_zeros(()) for name in trainable]
    return float(loss.detach()), torch.stack([norm.float().detach() for norm in norms])


@contextmanager
def unchanged(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or evaluation mode inside; afterwards modes, zero tensors, buffers, gradients and RNG
    as before."""
    modes = {module: module.training for module in model.modules()}
    gradients = {p: p.grad for p in model.parameters()}
    zeros = {p: p.detach().clone() for p in model.parameters() if _is_zero(p)}
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
                for tensor, before in (zeros | buffers).items():
                    tensor.copy_(before)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for module, training in modes.items():
                module.training = training


def fill_zeros(trainable: dict[str, nn.Parameter]) -> None:
    """Small noise in place of tensors that are all zero."""
    # A generator of its own: the same noise on every rank, whatever was drawn before.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable.values():
            if _is_zero(parameter):
                noise = torch.randn(parameter.shape, generator=generator) * NOISE
                parameter.copy_(noise)


def _is_zero(parameter: nn.Parameter) -> bool:
    if not parameter.requires_grad or parameter.is_meta or parameter.numel() == 0:
        return False
    return not parameter.detach().any().item()


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
