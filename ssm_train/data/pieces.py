"""Records in pieces, encoded in order: by this process, and by several where it takes long."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import TypeVar

from ssm_train.data.records import Placed, Records
from ssm_train.data.tokens import Chunk
from ssm_train.errors import InputError

CHUNK_RECORDS = 2_048
CHUNK_CHARACTERS = 2_000_000  # a token takes some 250 bytes until its id is all that is kept
PARALLEL_AFTER_SECONDS = 5.0  # before, starting processes costs more than it saves

T = TypeVar("T")
Encode = Callable[[Sequence[Placed]], Chunk]
"""Can be sent to another process."""


def encode_all(
    encode: Encode, records: Records, limit: int | None, num_workers: int
) -> Iterator[tuple[int, Chunk]]:
    """(records in a piece, their examples) in order: the first pieces here, the rest in processes.

    Raises InputError where a process was killed.
    """
    pieces = cut(islice(records.placed(), limit), _characters)
    begun = time.monotonic()
    first = next(pieces, None)
    while first and not (num_workers and time.monotonic() > begun + PARALLEL_AFTER_SECONDS):
        yield len(first), encode(first)
        first = next(pieces, None)
    if first is None:
        return
    workers = min(num_workers, os.cpu_count() or 1)
    # Spawned, not forked: this process has threads, and may hold a GPU.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encode,)) as pool:
        waiting: deque[tuple[int, Future[Chunk]]] = deque()
        while first is not None or waiting:
            while first is not None and len(waiting) < 2 * workers:
                waiting.append((len(first), pool.submit(_encode_in_worker, first)))
                first = next(pieces, None)
            size, future = waiting.popleft()
            try:
                yield size, future.result()
            except BrokenProcessPool:
                raise InputError(
                    f"{records.name}: a process that tokenizes was killed, mostly because memory "
                    f"ran out; set num_data_workers to less than {num_workers}, or to 0"
                ) from None


def cut(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Runs of items that end at CHUNK_RECORDS items, or where they reach CHUNK_CHARACTERS."""
    run: list[T] = []
    size = 0
    for item in items:
        run.append(item)
        size += characters(item)
        if len(run) == CHUNK_RECORDS or size >= CHUNK_CHARACTERS:
            yield run
            run, size = [], 0
    if run:
        yield run


def _characters(placed: Placed) -> int:
    """About as many as the texts of the record have."""
    return sum(len(str(value)) for value in placed[1].values())


_encode: Encode | None = None  # set once in each tokenizing process


def _start_worker(encode: Encode) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process already has its core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; the main process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encode = encode


def _end_with_parent() -> None:
    """Else a process whose parent was killed waits for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(piece: list[Placed]) -> Chunk:
    assert _encode is not None
    return _encode(piece)
