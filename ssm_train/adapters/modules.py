"""Modules that LoRA and engines reach, and what is asked of a module before it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssm_train.adapters.base import KernelChoice
from ssm_train.kernels.again import made_again, recomputed
from ssm_train.kernels.causal_conv1d import causal_conv1d
from ssm_train.kernels.pointwise import add_bias
from ssm_train.loss import sum_linear_cross_entropy

CACHE_NAMES = ("past_key_values", "cache_params")
"""What forwards call a cache of states."""


def retype(model: nn.Module, table: Mapping[type[nn.Module], type[nn.Module]]) -> int:
    """Gives every module whose exact type is in `table` the type it maps to; returns how many.

    Weights, names and hooks stay; only the methods are ours. The new types subclass the old ones
    and add no state of their own.
    """
    count = 0
    for module in model.modules():
        if new_type := table.get(type(module)):
            module.__class__ = new_type
            count += 1
    return count


def under_adapters(module: Any) -> Any:
    """The layer itself, where adapters are around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def stored_weight(module: Any) -> Any:
    """The weight of a layer, under adapters too, for a look at what it is; None: it has none.
    ZeRO-3 gathers one that is asked for by name while another module's forward runs."""
    module = under_adapters(module)
    stored = dict.get(module._parameters, "weight")
    return getattr(module, "weight", None) if stored is None else stored


def is_plain_linear(module: nn.Module) -> bool:
    """Whether its weight may be used in place of its forward: no adapter, no hooks, not sharded."""
    weight = stored_weight(module)
    return (
        type(module) in (nn.Linear, Fp32BiasLinear, LmHead)
        and isinstance(weight, Tensor)
        and type(weight.data) is Tensor
        # ZeRO-3: it is there while its layer runs, if layers are gathered at once
        and (not hasattr(weight, "ds_id") or hasattr(weight, "ds_z3_leaf_module"))
        and not has_hooks(module)
    )


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def autocasts(x: Tensor) -> bool:
    """Whether operations choose their dtype by themselves where x is."""
    return x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products of x."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def matches(name: str, suffixes: Iterable[str]) -> bool:
    """Whether a dotted name ends with one of the suffixes, as whole name parts."""
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


class Site(nn.Module):
    """A place in a mixer where a PEFT method may step in. It has no parameters and changes
    nothing: the value that it gets is the value that it gives."""

    def forward(self, value: Any, *context: Tensor) -> Any:
        return value


def add_sites(module: nn.Module, names: tuple[str, ...]) -> None:
    """Gives a mixer its sites, unless it has them."""
    for name in names:
        if not hasattr(module, name):
            module.add_module(name, Site())


class Fp32BiasLinear(nn.Linear):
    """A linear layer whose bias is added in fp32 and whose output is fp32 (or fp64).

    For the projections before a softplus or a logsigmoid. All of it happens in the layer's own
    forward, so that LoRA wraps it and sharding engines gather the weights.
    """

    kernels: KernelChoice = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return self.add_bias(F.linear(x, self.weight))

    def add_bias(self, y: Tensor) -> Tensor:
        if self.bias is None:
            return y.to(torch.promote_types(y.dtype, torch.float32))
        return add_bias(y, self.bias, kernels=self.kernels)


class LmHead(nn.Linear):
    """A plain head, which given targets returns their loss and never has all logits at once. It
    does so in its own forward, where engines have gathered its weight."""

    def forward(
        self, x: Tensor, positions: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """x [..., H] -> logits [..., V]; with flat `positions` [S] and `targets` [S] the loss []
        fp32 of `sum_linear_cross_entropy`."""
        if positions is None or targets is None:
            return F.linear(x, self.weight, self.bias)
        dtype = compute_dtype(x) if autocasts(x) else self.weight.dtype
        return sum_linear_cross_entropy(x.flatten(0, -2), self.weight, positions, targets, dtype)

    def gives_loss_of(self, hidden: Tensor) -> bool:
        """Whether it can: in fp16 gradients are scaled before they are cast; a bias, and hooks
        other than ZeRO-3's, are for logits."""
        weight = stored_weight(self)
        dtype = compute_dtype(hidden) if autocasts(hidden) else weight.dtype
        hooked = has_hooks(self) and not hasattr(weight, "ds_id")
        return self.bias is None and dtype != torch.float16 and not hooked


def project(x: Tensor, *modules: nn.Module) -> list[Tensor]:
    """Outputs of modules that read the same x, which is cast once and not by each; those that say
    so (`joins`) are one operation. None keeps x for the backward pass if it can be made again."""
    x = x.to(compute_dtype(x))
    several = modules if len(modules) > 1 else ()  # one alone is called, as what it is
    lead: Any = next((module for module in several if hasattr(module, "joins")), None)
    joint = [module for module in modules if lead is not None and lead.joins(module, x)]
    with made_again(x):
        together = dict(zip(joint, lead.forward_together(joint, x), strict=True)) if joint else {}
        return [together[module] if module in together else module(x) for module in modules]


def recompute_in(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), which calls a small module: computed again in the backward pass (see
    `again.recomputed`), unless the module may draw random numbers."""
    if not draws_nothing(module):
        return function(x)
    return recomputed(function, x, weights=module.parameters())


def draws_nothing(module: nn.Module) -> bool:
    """Whether it is a linear layer, or our LoRA on one without a dropout. Other adapters may draw
    without a module of their own for it, as LoKr's `rank_dropout` does."""
    known = type(module) in (nn.Linear, Fp32BiasLinear) or hasattr(module, "joins")
    return known and not any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())


class CausalConv1d(nn.Conv1d):
    """A depthwise causal convolution over time-major input; its weight is read only in here."""

    kernels: KernelChoice = "auto"

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        window: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        activation: str | None = None,
        output_final_window: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, d] -> ([B, T, d], the last W - 1 inputs [N, d, W - 1] or None).

        `window` [N, d, W - 1]: the inputs before the first one, zeros by default.
        """
        return causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            activation=activation,
            initial_window=window,
            output_final_window=output_final_window,
            cu_seqlens=cu_seqlens,
            kernels=self.kernels,
        )


class Part:
    """A mixer or an MLP, which may be recomputed in the backward pass without its whole layer."""

    part: str
    recompute = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        forward: Any = cls.__dict__.get("forward")
        if forward is None or hasattr(forward, "__wrapped__"):
            return

        @wraps(forward)
        def forward_or_recompute(self: Any, *args: Any, **options: Any) -> Any:
            # What a cache holds is changed by the first run: a second one would begin elsewhere.
            caches = any(options.get(name) is not None for name in CACHE_NAMES)
            recomputes = self.recompute and self.training and torch.is_grad_enabled()
            if recomputes and not caches:
                return checkpoint(forward, self, *args, use_reentrant=False, **options)
            return forward(self, *args, **options)

        cls.forward = forward_or_recompute  # type: ignore[attr-defined]


def check_fp32(module: nn.Module, names: tuple[str, ...]) -> None:
    """Asserts that these parameters are stored in fp32 (or fp64): in bf16, small steps are lost.

    Mixers call it in their first forward, and in the first one under an engine.
    """
    for name in names:
        *path, last = name.split(".")
        owner: Any = module
        for part in path:
            owner = getattr(owner, part, None)
        owner = under_adapters(owner)
        owner = None if owner is None else dict.get(owner._parameters, last)  # as `stored_weight`
        if isinstance(owner, Tensor) and owner.dtype not in (torch.float32, torch.float64):
            raise AssertionError(f"{name} of {type(module).__name__} is {owner.dtype}, not fp32")
