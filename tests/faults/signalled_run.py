"""`signalled_run.py RANK PLACE SIGNALS COMMAND ...`: a command line of ssm_train in which one rank
gets signals, named such as SIGINT+SIGINT, in an optimizer step (4) or before an evaluation's batch,
all of them counted (eval-7); after the first one it hangs."""

import os
import signal
import sys
import time
from itertools import count
from typing import Any

from ssm_train import evaluation, ready
from ssm_train.cli import main
from ssm_train.stop_flag import StopFlag

if __name__ == "__main__":
    rank, place, names, *command = sys.argv[1:]
    first, *others = (signal.Signals[name] for name in names.split("+"))
    make, collate, evaluated = ready.make_batches, evaluation.collate, count(1)

    def send(here: str) -> None:
        if here == place and os.environ["RANK"] == rank:
            os.kill(os.getpid(), first)
            for number in others:
                time.sleep(StopFlag.SECONDS_OF_ONE + 0.5)
                os.kill(os.getpid(), number)
                time.sleep(60)

    def make_batches(data: Any, order: Any, cfg: Any, k: int) -> Any:
        send(str(k))
        return make(data, order, cfg, k)

    def collate_evaluated(*given: Any) -> Any:
        send(f"eval-{next(evaluated)}")
        return collate(*given)

    ready.make_batches, evaluation.collate = make_batches, collate_evaluated
    sys.exit(main(command))
