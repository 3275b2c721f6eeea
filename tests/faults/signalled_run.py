"""`signalled_run.py RANK STEP SIGNALS COMMAND ...`: a command line of ssm_train in which one rank
gets signals, named such as SIGINT+SIGINT, in an optimizer step; after the first one it hangs."""

import os
import signal
import sys
import time
from typing import Any

from ssm_train import fit
from ssm_train.cli import main
from ssm_train.stop_flag import StopFlag

if __name__ == "__main__":
    rank, step, names, *command = sys.argv[1:]
    first, *others = (signal.Signals[name] for name in names.split("+"))
    original = fit.make_batches

    def make_batches(data: Any, order: Any, cfg: Any, k: int) -> Any:
        if k == int(step) and os.environ["RANK"] == rank:
            os.kill(os.getpid(), first)
            for number in others:
                time.sleep(StopFlag.SECONDS_OF_ONE + 0.5)
                os.kill(os.getpid(), number)
                time.sleep(60)
        return original(data, order, cfg, k)

    fit.make_batches = make_batches
    sys.exit(main(command))
