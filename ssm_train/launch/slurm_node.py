"""`accelerate launch` on one node of a job, with the exit code of the run. By itself it makes 1 of
every failure, so that a run which saved itself to be started again would look like a broken one.
`python -m ssm_train.launch.slurm_node accelerate launch ...`"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from ssm_train.commands import REQUEUE


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or the exit code of the rank that failed, as a shell would see it."""
    from accelerate.commands.accelerate_cli import main as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    sys.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        accelerate()
    except ChildFailedError as error:  # several processes
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except subprocess.CalledProcessError as error:  # one
        codes = {0: error.returncode}
    except SignalException as error:  # the launcher was told to end
        return end(f"stopped by {error.sigval.name}", 128 + error.sigval)
    else:
        return 0
    rank, code = choose_failure(codes)
    return end(f"rank {rank} {describe(code)}", code if code > 0 else 128 - code)


def choose_failure(codes: Mapping[int, int]) -> tuple[int, int]:
    """(rank, exit code) of a rank that broke, else of one that only saved itself."""
    return min(codes.items(), key=lambda item: (item[1] == REQUEUE, item[0]))


def describe(code: int) -> str:
    if code == REQUEUE:
        return "saved itself and wants to be started again"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def end(what: str, code: int) -> int:
    sys.stderr.write(f"node {os.environ.get('SLURMD_NODENAME', platform.node())}: {what}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
