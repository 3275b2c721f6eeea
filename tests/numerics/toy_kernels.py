"""An autotuned kernel as fla has them, whose measurements are made up and whose launches are kept.
`test_tuning.py` loads it anew for every test, as a module of fla."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

BLOCKS = (8, 16, 32, 64)
FASTEST = 32
launched: list[int] = []
"""BLOCK of every launch."""
measured: list[int] = []
"""BLOCK of every benchmark."""
too_large: set[int] = set()
"""BLOCKs that the device has no room for."""


def note(arguments: dict[str, Any]) -> None:
    launched.append(arguments["BLOCK"])
    if arguments["BLOCK"] in too_large:
        raise OutOfResources(2, 1, "shared memory")


def measure(kernel: Callable[[], object], quantiles: object) -> list[float]:
    kernel()
    measured.append(launched[-1])
    return [abs(launched[-1] - FASTEST) + 1.0] * 3


def leave_out_larger(configs: list[Any], nargs: dict[str, Any], **kwargs: Any) -> list[Any]:
    n = {**nargs, **kwargs}["n"]
    return [config for config in configs if config.kwargs["BLOCK"] <= max(n, min(BLOCKS))]


@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % 2 == 0})
@triton.autotune(
    configs=[triton.Config({"BLOCK": block}, pre_hook=note) for block in BLOCKS],
    key=["n", "ADD"],
    prune_configs_by={"early_config_prune": leave_out_larger},
    do_bench=measure,
)
@triton.jit
def double(x, y, n, ADD: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = 2 * tl.load(x + places, mask=places < n)
    if ADD:
        value += 1
    tl.store(y + places, value, mask=places < n)
