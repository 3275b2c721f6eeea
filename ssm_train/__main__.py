"""`python -m ssm_train` is `ssm-train`."""

import sys

from ssm_train.cli import main

sys.exit(main())
