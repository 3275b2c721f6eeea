"""One cluster for all tests here, and the way to the integration tests' tiny models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "integration")]

from cluster import Cluster, running_cluster, why_not  # noqa: E402
from slurm_runs import Runs  # noqa: E402


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path) -> Iterator[Runs]:
    yield Runs(cluster, tmp_path)
    cluster.cancel_all()
