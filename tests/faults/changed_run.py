"""`changed_run.py CONFIG`: verify-resume under a launcher, with the random state of rank 1 changed
while the run is dead. Prints what differs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from kills import change_numpy_state

from ssm_train.config import load_config
from ssm_train.verify_resume import verify

if __name__ == "__main__":
    difference = verify(
        load_config(sys.argv[1])[0],
        3,
        sys.stdout.write,
        lambda run_dir: change_numpy_state(run_dir, rank=1),
    )
    sys.stdout.write(f"{difference}\n")
