"""`failing_rank.py WHAT STEP CONFIG`, under torchrun: rank 1 dies, hangs or has too little memory
in an optimizer step; in step -1 before the first one. Or its second layer's mixer gives NaN from
that step on."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from ssm_train import loop, ready
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


def spoil() -> None:
    def add_nan(module: torch.nn.Module, _: Any, output: Any) -> Any:
        second = "Mixer" in type(module).__name__ and getattr(module, "layer_idx", 0) == 1
        return output + torch.nan if second else output

    torch.nn.modules.module.register_module_forward_hook(add_nan)


def fail_in(step: int, fail: Any) -> None:
    if step < 0:
        fail()
    original = ready.make_batches

    def make_batches(data: Any, order: Any, cfg: Any, k: int) -> Any:
        if k == step:
            fail()
        return original(data, order, cfg, k)

    ready.make_batches = make_batches


FAILURES = {"die": die, "hang": hang, "memory": run_out_of_memory, "nan": spoil}


if __name__ == "__main__":
    what, step, config = sys.argv[1:]
    Path(config).with_name(f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        fail_in(int(step), FAILURES[what])
    sys.exit(main(["train", "--cfg", config]))
