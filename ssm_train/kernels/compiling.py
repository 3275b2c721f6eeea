"""Triton's compilations: several at a time before a first step, and what is said meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
from triton.runtime import Autotuner, JITFunction

from ssm_train.kernels.tuning import Lookup, find_choosing, intercept, key_of

MOST_THREADS = 16


@contextmanager
def compile_ahead() -> Iterator[None]:
    """Meanwhile no kernel runs; they are compiled and loaded, several at a time. What is computed
    inside is garbage of the right shapes. A kernel without a stored choice is left out: it has to
    be tuned. One that does not compile says so when it is launched.
    """
    from triton import AsyncCompileMode

    run, run_tuner = JITFunction.run, Autotuner.run
    stored = {name: vars(tuner).get("run") for name, tuner in find_choosing().items()}
    compiled: list[Any] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    def skip_untuned(self: Any, *args: Any, **options: Any) -> Any:
        if len(self.configs) == 1 or key_of(self, args, options) in self.cache:
            return run_tuner(self, *args, **options)
        self.best_config = self.configs[0]  # which some callers read
        return None

    def choose(name: str, tuner: Any, launch: Any, args: Any, options: Any) -> Any:
        key, lookup = key_of(tuner, args, options), stored[name]
        config = lookup.find(key, args, options) if isinstance(lookup, Lookup) else None
        if key in tuner.cache or config is None:
            return skip_untuned(tuner, *args, **options)
        tuner.cache[key] = config
        try:
            return launch(*args, **options)
        finally:
            del tuner.cache[key]  # whether it fits shows when it runs

    with start_threads() as pool:
        # Triton looks for its mode in the thread that launches: the backward pass has to be in it.
        with (
            AsyncCompileMode(pool, ignore_errors=True),
            torch.autograd.set_multithreading_enabled(False),
            intercept(choose),
        ):
            JITFunction.run, Autotuner.run = compile_only, skip_untuned  # type: ignore[method-assign]
            try:
                yield
            finally:
                JITFunction.run, Autotuner.run = run, run_tuner  # type: ignore[method-assign]
        # Triton 3.6 runs a C compiler for what launches a kernel, a third of a second each.
        list(pool.map(load, {id(kernel): kernel for kernel in compiled}.values()))


def start_threads() -> ThreadPoolExecutor:
    """As many as there are cores, on this thread's GPU."""
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    if not torch.cuda.is_available():
        return ThreadPoolExecutor(threads)
    here = (torch.cuda.current_device(),)
    return ThreadPoolExecutor(threads, initializer=torch.cuda.set_device, initargs=here)


def load(kernel: Any) -> None:
    """A compiled kernel, as its first launch does."""
    with suppress(Exception):  # it says so when it is launched
        if hasattr(kernel, "result"):  # it is what was compiled on another thread
            kernel = kernel.result()
        kernel.run  # noqa: B018  a property that loads


@contextmanager
def tell_compiling(say: Callable[[str], None], seconds: float = 5.0) -> Iterator[None]:
    """Meanwhile says, at most once in so many seconds, how many kernels Triton has compiled."""
    from triton import knobs

    before, count, said = knobs.compilation.listener, 0, time.monotonic()

    def listen(*, cache_hit: bool, **about: Any) -> None:
        nonlocal count, said
        if before is not None:
            before(cache_hit=cache_hit, **about)
        count += not cache_hit
        if not cache_hit and time.monotonic() - said >= seconds:
            said = time.monotonic()
            say(f"compiling kernels: {count} so far")

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        knobs.compilation.listener = before
