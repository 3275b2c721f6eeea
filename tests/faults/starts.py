"""Command lines in processes of their own: under torchrun, or two ranks that nobody watches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    common = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return os.environ | common | more


def start(
    processes: int, *command: object, seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """With torchrun, where there are several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, command)],
        env=environment(), capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip


def start_two(
    *command: object, places: Sequence[Path | None] = (None, None)
) -> list[tuple[int, str]]:
    """Exit code and stderr of each of two ranks, without a launcher, which would end the other.
    `places`: their working directories."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=place,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **world),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank, place in enumerate(places)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    return [(p.returncode, error) for p, error in zip(ranks, errors, strict=True)]
