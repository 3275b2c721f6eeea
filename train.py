"""`python train.py --cfg cfg/x.yaml` is `ssm-train train --cfg cfg/x.yaml`."""

import sys

from ssm_train.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
