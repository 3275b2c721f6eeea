"""Kernels of fla and mamba_ssm without the search for the fastest configuration, which takes
minutes in the dtypes of tests: what is tested is their results, not their speed."""

from __future__ import annotations

from math import prod
from typing import Any

from triton.runtime.autotuner import Autotuner, Config

from ssm_train.kernels.tuning import PACKAGES

PRUNE = Autotuner.prune_configs


def choose(configs: list[Config]) -> Config:
    """One that compiles fast and fits any GPU."""

    def cost(config: Config) -> tuple[int, int, int]:
        sizes = [v for v in config.kwargs.values() if type(v) is int]
        return abs(config.num_warps - 4), abs(config.num_stages - 2), prod(sizes)

    return min(configs, key=cost)


def prune_to_one(tuner: Autotuner, kwargs: dict[str, Any]) -> list[Config]:
    """In place of `Autotuner.prune_configs`: of what a kernel's own pruning leaves, as that takes
    out configurations that are wrong, such as those that a compiler of this GPU breaks."""
    configs = PRUNE(tuner, kwargs)
    package, _, _ = tuner.base_fn.__module__.partition(".")
    return [choose(configs)] if package in PACKAGES else configs


def take_one_config() -> None:
    """From now on, but for tests that put PRUNE back, as those of tuning do."""
    Autotuner.prune_configs = prune_to_one
