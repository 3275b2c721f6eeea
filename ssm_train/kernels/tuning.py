"""Which configuration an autotuned kernel of fla or mamba_ssm runs with: the one stored for this
GPU model, else the fastest that Triton measures."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.autotuner import Autotuner, Config
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import KernelInterface

from ssm_train.kernels.choices import Choices, Entries, Gpu, Key, load

PACKAGES = ("fla", "mamba_ssm")


def find_autotuners(packages: tuple[str, ...] = PACKAGES) -> dict[str, Autotuner]:
    """Every autotuner in the loaded modules of these packages, by module and name of its kernel."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.partition(".")[0] not in packages:
            continue
        for value in list(vars(module).values()):
            while isinstance(value, KernelInterface) and not isinstance(value, Autotuner):
                value = getattr(value, "fn", None)  # of heuristics around it
            if isinstance(value, Autotuner):
                found[f"{value.base_fn.__module__}.{value.base_fn.__name__}"] = value
    return found


def find_choosing(packages: tuple[str, ...] = PACKAGES) -> dict[str, Autotuner]:
    """Those that have something to choose from."""
    found = find_autotuners(packages)
    return {name: tuner for name, tuner in found.items() if len(tuner.configs) > 1}


def key_of(tuner: Autotuner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
    """What `Autotuner.run` keeps its choice under."""
    given = {**dict(zip(tuner.arg_names, args, strict=False)), **kwargs}
    names = set(tuner.arg_names)
    known = {name: value for name, value in given.items() if name in names}
    sizes = [known[name] for name in tuner.keys if name in known]
    return (*sizes, *(str(value.dtype) for value in known.values() if hasattr(value, "dtype")))


def plain(key: Key) -> Key:
    """The key as JSON keeps it."""
    return tuple(v if isinstance(v, str | int | float | None) else str(v) for v in key)


def describe(config: Config) -> dict[str, Any]:
    """A configuration as JSON keeps it; a hook of its own belongs to the kernel."""
    return {k: v for k, v in vars(config).items() if k != "pre_hook" and v is not None}


# ---------------------------------------------------------------- stored choices


def use_stored(gpu: Gpu, package: str) -> str:
    """From now on a stored choice stands in for the search of every autotuner that the package has
    loaded. Returns the line for the run's log."""
    if "FLA_CACHE_MODE" in os.environ:
        return "FLA_CACHE_MODE is set, so stored kernel choices are left aside"
    choices, sources = load(gpu)
    known = any(name.startswith(f"{package}.") for name in choices)
    for name, tuner in find_choosing((package,)).items():
        tuner.run = Lookup(tuner, choices.get(name, {}), known)
    if known:
        return f"stored {package} kernel choices for {gpu.name}: {', '.join(sources)}"
    unread = "".join(f", {source}" for source in sources if "cannot be read" in source)
    return (
        f"no stored {package} kernel choices for {gpu.name}{unread}: its kernels are tuned in the "
        "first steps, which takes minutes; run ssm-train warmup once"
    )


@dataclass
class Lookup:
    """`run` of an autotuner, after a look at what is stored."""

    tuner: Autotuner
    entries: Entries
    known: bool
    """Whether other kernels of the package have choices, so that nobody waits for tuning."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = partial(type(self.tuner).run, self.tuner)
        key, cache = key_of(self.tuner, args, kwargs), self.tuner.cache
        if key in cache:
            return run(*args, **kwargs)
        if (config := self.find(key, args, kwargs)) is None:
            if self.known:
                tell_tuning(self.tuner, "has no stored choice")
            return run(*args, **kwargs)
        cache[key] = config
        try:
            return run(*args, **kwargs)
        except DO_NOT_FIT:  # it fitted other sizes, or another Triton
            del cache[key]
            tell_tuning(self.tuner, f"cannot run with its stored choice ({config})")
            return run(*args, **kwargs)

    def find(self, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Config | None:
        """The nearest choice that is one of the kernel's own configurations for these arguments:
        its pruning leaves out what would be wrong for them. None: there is none."""
        key = plain(key)
        distances = {other: distance(key, other) for other in self.entries}
        ranked = sorted(
            (k for k, d in distances.items() if d < math.inf), key=distances.__getitem__
        )
        if not ranked:
            return None
        self.tuner.nargs = dict(zip(self.tuner.arg_names, args, strict=False))
        allowed = self.tuner.prune_configs(kwargs)
        wanted = (self.entries[other] for other in ranked)
        return next((c for w in wanted for c in allowed if describe(c) == w), None)


DO_NOT_FIT = OutOfResources, PTXASError, CompileTimeAssertionFailure
"""What Triton's own search passes over."""


def tell_tuning(tuner: Autotuner, reason: str) -> None:
    warnings.warn(
        f"{tuner.base_fn.__name__} {reason} and is tuned now, as others may be, which can take "
        "minutes; ssm-train warmup does it once",
        stacklevel=3,
    )


ANOTHER = 10.0  # what a flag or a dtype that differs counts, more than any sizes


def distance(key: Key, other: Key) -> float:
    """How unlike two keys of a kernel are; infinite, if they have other sizes than each other.

    Positive numbers differ by |log ratio|, flags and dtypes by `ANOTHER`; tensors of integers,
    which say where documents are, do not count. A distant choice may be slow, never wrong: each is
    one that Triton might have taken.
    """
    (sizes, dtypes), (other_sizes, other_dtypes) = split(key), split(other)
    if len(sizes) != len(other_sizes):
        return math.inf
    total = ANOTHER * abs(len(dtypes) - len(other_dtypes))
    total += ANOTHER * sum(a != b for a, b in zip(dtypes, other_dtypes, strict=False))
    for a, b in zip(sizes, other_sizes, strict=True):
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
        if numbers and a > 0 and b > 0:
            total += abs(math.log(a / b))
        elif type(a) is not type(b) or a != b:
            total += ANOTHER
    return total


def split(key: Key) -> tuple[list[Any], list[str]]:
    """Sizes and flags, and the dtypes of all tensors but those of integers."""
    dtypes = [v for v in key if isinstance(v, str) and v.startswith("torch.")]
    return (
        [v for v in key if v not in dtypes],
        [dtype for dtype in dtypes if not dtype.startswith(("torch.int", "torch.uint"))],
    )


# ---------------------------------------------------------------- tuning


def collect() -> Choices:
    """What every autotuner has chosen in this process."""
    return {
        name: {plain(key): describe(config) for key, config in tuner.cache.items()}
        for name, tuner in sorted(find_choosing().items())
        if tuner.cache
    }


@contextmanager
def intercept(around: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile `around(name, tuner, run, args, kwargs)` stands in for each autotuner's run; `run`
    is Triton's own, which looks at nothing stored."""
    tuners = find_choosing()
    before = {name: vars(tuner).get("run") for name, tuner in tuners.items()}

    def replace(name: str, tuner: Autotuner) -> None:
        run = partial(type(tuner).run, tuner)
        tuner.run = lambda *args, **kwargs: around(name, tuner, run, args, kwargs)

    for name, tuner in tuners.items():
        replace(name, tuner)
    try:
        yield
    finally:
        for name, tuner in tuners.items():
            if before[name] is None:
                del tuner.run
            else:
                tuner.run = before[name]


@contextmanager
def compile_share(index: int, count: int) -> Iterator[None]:
    """Meanwhile autotuners compile every `count`-th configuration from `index` on, launch each once
    and time none: what `count` processes leave in Triton's cache on disk is all that tuning needs.
    """

    def compile_some(name: str, tuner: Autotuner, run: Any, args: Any, kwargs: Any) -> Any:
        key = key_of(tuner, args, kwargs)
        if key not in tuner.cache:
            tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
            vars(tuner)["do_bench"] = launch_once  # in front of a cached property
            configs = tuner.prune_configs(kwargs)
            launch = partial(tuner._bench, *args, **kwargs)
            share = [config for config in configs[index::count] if fits(launch(config=config))]
            others = (config for config in configs if fits(launch(config=config)))
            tuner.cache[key] = next(iter(share or others), configs[0])
            del vars(tuner)["do_bench"]
        return run(*args, **kwargs)

    with intercept(compile_some):
        yield


def launch_once(kernel: Callable[[], object], quantiles: object) -> list[float]:
    """A benchmark that measures nothing."""
    kernel()
    return [0.0, 0.0, 0.0]


def fits(timings: list[float]) -> bool:
    """Whether a configuration ran; Triton gives one that does not compile or fit infinite time."""
    return timings[0] < math.inf


@contextmanager
def tune_anew(say: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile every autotuner measures, whatever is stored here or by Triton, and says what it
    chose and how long that took."""

    def tune(name: str, tuner: Autotuner, run: Any, args: Any, kwargs: Any) -> Any:
        key = key_of(tuner, args, kwargs)
        if key in tuner.cache:
            return run(*args, **kwargs)
        began, keeps = time.perf_counter(), tuner.cache_results
        tuner.cache_results = False
        try:
            result = run(*args, **kwargs)
        finally:
            tuner.cache_results = keeps
        say(f"{name}  {tuner.cache[key]}  {time.perf_counter() - began:.1f} s")
        return result

    with intercept(tune):
        yield
