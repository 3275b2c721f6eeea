"""A directory for made-up jobs, and the way to the integration tests' tiny models."""

import sys
from pathlib import Path

import pytest
from made_up_jobs import ROOT, Room, make_room

sys.path.append(str(ROOT / "tests" / "integration"))


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return make_room(tmp_path)
