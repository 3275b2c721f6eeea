"""`killed_run.py SAVE POINT NTH COMMAND ...`: a command line of ssm_train, killed in its save
number SAVE at the NTH write point of this name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from kills import kill_in_save

from ssm_train import durable
from ssm_train.cli import main

if __name__ == "__main__":
    save, point, nth, *command = sys.argv[1:]
    durable.at_write_point = kill_in_save(int(save), (point, int(nth)))
    sys.exit(main(command))
