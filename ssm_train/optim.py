"""Parameter groups from the family's traits, the optimizer, and the learning rate of a step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from ssm_train.settings import Settings

POLYNOMIAL_END = 1e-7  # learning rate at the end of a polynomial decay
INVERSE_SQRT_STEPS = 10_000  # time scale of inverse_sqrt without warm-up


class OptimSettings(Settings):
    """Optimizer and schedule; names and defaults of the Hugging Face Trainer."""

    optim: Literal["adamw_torch", "adamw_torch_fused"] = "adamw_torch"
    """AdamW; both names mean the fused implementation."""
    learning_rate: float = Field(default=5e-4, ge=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; never on norms, biases or the family's `no_decay` parameters."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradient norm above which gradients are scaled down; 0 turns it off."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running mean of the gradient."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the running mean of the squared gradient."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator of the update."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
        "constant",
        "constant_with_warmup",
    ] = "linear"
    """Shape after warm-up, as in transformers with its defaults; linear and cosine end at zero."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up; wins over `warmup_ratio`."""
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    """Warm-up as a share of all steps."""


def lr_at(step: int, total_steps: int, settings: OptimSettings) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total_steps`: a pure function.

    Linear warm-up to `learning_rate`, then the shape of `lr_scheduler_type`. Equal to the Hugging
    Face schedules of the same names with their defaults (one cycle; power 1 down to 1e-7).
    """
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total_steps)
    peak, kind = settings.learning_rate, settings.lr_scheduler_type
    if kind == "constant":
        return peak
    if step < warmup:
        return peak * step / max(1, warmup)
    left = max(0.0, 1 - (step - warmup) / max(1, total_steps - warmup))
    match kind:
        case "linear":
            return peak * left
        case "cosine" | "cosine_with_restarts":
            return peak * 0.5 * (1 + math.cos(math.pi * (1 - left)))
        case "polynomial":
            end = min(peak, POLYNOMIAL_END)
            return end + (peak - end) * left
        case "inverse_sqrt":
            timescale = warmup or INVERSE_SQRT_STEPS
            return peak / math.sqrt((step - warmup + timescale) / timescale)
        case "constant_with_warmup":
            return peak


def decays(name: str, parameter: torch.Tensor, no_decay: Iterable[str]) -> bool:
    """Whether weight decay applies: matrices only, and none whose name has a part of `no_decay`."""
    if parameter.ndim < 2:
        return False
    return not any(f".{part}." in f".{name}." for part in no_decay)


LrScale = Callable[[str], float]
"""Parameter name -> what the learning rate of a step is multiplied by for it."""


def same_rate(name: str) -> float:
    """The LrScale of a run with one learning rate."""
    return 1.0


def parameter_groups(
    model: nn.Module,
    settings: OptimSettings,
    no_decay: Sequence[str],
    lr_scale: LrScale = same_rate,
) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay or none, and by `lr_scale`, which stays in the group
    under this name: the loop multiplies each step's learning rate by it."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = lr_scale(name), decays(name, parameter, no_decay)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": params,
            "weight_decay": settings.weight_decay if decay else 0.0,
            "lr": settings.learning_rate * scale,
            "lr_scale": scale,
        }
        for (scale, decay), params in groups.items()
        if params
    ]


def describe_rates(optimizer: torch.optim.Optimizer) -> list[str]:
    """For the log: a line for each learning rate that is not the run's."""
    counts: Counter[float] = Counter()
    for group in optimizer.param_groups:
        counts[group["lr_scale"]] += len(group["params"])
    return [
        f"learning rate x {scale:g} for {count} of {counts.total()} trained tensors"
        for scale, count in counts.items()
        if scale != 1
    ]


def build_optimizer(
    model: nn.Module,
    settings: OptimSettings,
    no_decay: Sequence[str],
    lr_scale: LrScale = same_rate,
) -> torch.optim.AdamW:
    """Fused AdamW: on CPU and GPU it skips a step on the device when `found_inf` says so."""
    return torch.optim.AdamW(
        parameter_groups(model, settings, no_decay, lr_scale),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=True,
    )
