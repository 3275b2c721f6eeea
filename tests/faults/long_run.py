"""`long_run.py CONFIG FILE`: trains, and writes what the process holds and has used every hundred
steps: [step, KiB of memory of its own, open files, CPU seconds]."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ssm_train import ready
from ssm_train.cli import main

EVERY = 100


def look(step: int) -> list[float]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = int(status["RssAnon"].split()[0])
    return [step, memory, len(os.listdir("/proc/self/fd")), time.process_time()]


if __name__ == "__main__":
    config, file = sys.argv[1:]
    rows: list[list[float]] = []
    make_batches = ready.make_batches

    def watched(data: Any, order: Any, cfg: Any, step: int) -> Any:
        if step % EVERY == 0:
            rows.append(look(step))
        return make_batches(data, order, cfg, step)

    ready.make_batches = watched
    code = main(["train", "--cfg", config])
    Path(file).write_text(json.dumps(rows))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    sys.exit(code or len(children))
