"""The tiny runs of tests/integration, and points that only `make test-faults-full` takes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
