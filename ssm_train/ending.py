"""One process that cannot go on ends all of them, each with its reason."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import torch.distributed as dist

from ssm_train import distributed
from ssm_train.errors import unusable

SECONDS_BETWEEN_QUESTIONS = 1.0
SECONDS_TO_HEAR = 10.0
SECONDS_TO_LEAVE = 2.0
END = "ssm_train/end"
"""Where a process says why all have to end."""


def end_others(why: str) -> None:
    """One rank. Ends every other process that is inside `hear_others` with this line, also where it
    waits in a collective; returns when they know, or after `SECONDS_TO_HEAR`."""
    if not dist.is_initialized() or distributed.world_size() == 1:
        return
    store = _store()
    store.set(END, json.dumps([distributed.rank(), why]))
    heard = [
        f"{END}-{other}" for other in range(distributed.world_size()) if other != distributed.rank()
    ]
    until = time.monotonic() + SECONDS_TO_HEAR
    while time.monotonic() < until and not store.check(heard):
        time.sleep(0.1)


@contextmanager
def hear_others() -> Iterator[None]:
    """All ranks. Inside, a thread asks whether another process ends them all (`end_others`): then
    this one says why, and ends with exit code 2. A disk that fails on one process ends them all."""
    if not dist.is_initialized() or distributed.world_size() == 1:
        yield
        return
    done, store = Event(), _store()

    def listen() -> None:
        while not done.wait(SECONDS_BETWEEN_QUESTIONS):
            try:
                if not store.check([END]):
                    continue
                who, why = json.loads(store.get(END))
            except RuntimeError:  # the process that keeps the store has ended
                return
            if who != distributed.rank():
                sys.stderr.write(f"error (rank {distributed.rank()}): {why}\n")
                sys.stderr.flush()
                store.set(f"{END}-{distributed.rank()}", "")
                time.sleep(SECONDS_TO_LEAVE)  # a launcher ends the others when the first one ends
                os._exit(2)  # the main thread may wait in a collective for ever

    thread = Thread(target=listen, name="hear_others", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        if (why := unusable(error)) is not None:
            end_others(str(why))
        raise
    finally:
        done.set()
        thread.join()


def _store() -> Any:
    """What all processes can write to; a connection of its own, as one waits while it is used."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()
