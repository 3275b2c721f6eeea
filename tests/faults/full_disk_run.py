"""`full_disk_run.py DIRECTORY COMMAND ...`: a command line of ssm_train whose checkpoints, which go
to DIRECTORY, find a full disk there."""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from kills import FIRST

from ssm_train import durable
from ssm_train.cli import main

if __name__ == "__main__":
    disk, *command = sys.argv[1:]

    def mount(name: str) -> None:
        if name == FIRST and not os.path.ismount(disk):
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", disk], check=True)

    durable.at_write_point = mount
    sys.exit(main(command))
