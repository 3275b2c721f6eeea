"""`python train.py --cfg cfg/x.yaml` is `ssm-train train --cfg cfg/x.yaml`."""

import sys

from ssm_train.cli import main

if __name__ == "__main__":  # tokenizing processes import this file again
    sys.exit(main(["train", *sys.argv[1:]]))
