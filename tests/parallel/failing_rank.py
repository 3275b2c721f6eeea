"""`failing_rank.py WHAT STEP CONFIG`, under torchrun: rank 1 dies, hangs or has too little memory
in an optimizer step; in step -1 before the first one."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from ssm_train import fit, loop
from ssm_train.adapters.mamba import MambaAdapter
from ssm_train.cli import main


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    threading.Event().wait()


def run_out_of_memory() -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    MambaAdapter.token_losses = loop.loss_of = fail


def fail_in(step: int, fail: Any) -> None:
    if step < 0:
        fail()
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
        fail_in(int(step), {"die": die, "hang": hang, "memory": run_out_of_memory}[what])
    sys.exit(main(["train", "--cfg", config]))
