"""Recording a CUDA graph so that one that cannot be recorded leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


class NotRecorded(Exception):
    """What CUDA said, in a line."""


@contextmanager
def record(
    device: torch.device, *, pool: Any = None, random: bool = True, **options: Any
) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what is launched inside; nothing runs. NotRecorded where that cannot be.

    PyTorch leaves a failed recording half open: its stream is the current one and random numbers
    are refused. Here both are as before, and the graph's pool is given up. With `random` a failure
    gives the device another state of random numbers, equal to the one before: graphs recorded
    earlier draw from the old one and must not be replayed. Without it no random number may be
    drawn inside.

    pool: of `torch.cuda.graph_pool_handle`; options: those of `torch.cuda.graph`. Other threads,
    such as NCCL's, may ask CUDA for what they like meanwhile.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(device)
    pool = pool or torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[index]
    after, spare = generator.graphsafe_get_state(), generator.clone_state()
    if not random:
        generator.graphsafe_set_state(spare)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local", **options):
            yield graph
    except RuntimeError as error:
        torch.cuda.set_stream(stream)
        if random:
            after = spare
        if has_ended(graph):
            graph.reset()
        else:  # what PyTorch took for it stays taken
            with suppress(RuntimeError):  # it had not begun
                torch._C._cuda_endAllocateToPool(index, pool)
                torch._C._cuda_releasePool(index, pool)
        raise NotRecorded(str(error).partition("\n")[0]) from error
    finally:
        generator.graphsafe_set_state(after)


def has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether it is whole, be it of the half that was launched before an error that CUDA did not
    mind. Its pool then is its own to give up, once."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True
