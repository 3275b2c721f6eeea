"""`failing_rank.py WHAT STEP CONFIG`, under torchrun: rank 1 dies or hangs in an optimizer step."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from ssm_train import fit
from ssm_train.cli import main


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    threading.Event().wait()


def fail_in(step: int, fail: Any) -> None:
    original = fit.make_batches

    def make_batches(data: Any, order: Any, cfg: Any, k: int) -> Any:
        if k == step:
            fail()
        return original(data, order, cfg, k)

    fit.make_batches = make_batches


if __name__ == "__main__":
    what, step, config = sys.argv[1:]
    Path(config).with_name(f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        fail_in(int(step), {"die": die, "hang": hang}[what])
    sys.exit(main(["train", "--cfg", config]))
