"""What is made once is made once a node: by rank 0, then by one process of every other node."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from engine_runs import spawn

from ssm_train import distributed
from ssm_train.errors import InputError

LOCAL_RANKS = ("0", "1", "0")  # of two nodes


def work(directory: Path) -> None:
    """Each rank. Leaves when it worked, and what it was told."""
    rank = os.environ["RANK"]
    os.environ["LOCAL_RANK"] = LOCAL_RANKS[int(rank)]
    torch.distributed.init_process_group("gloo")

    def make() -> None:
        (directory / f"began-{rank}").write_text(str(time.time()))
        time.sleep(0.2)
        (directory / f"ended-{rank}").write_text(str(time.time()))

    def fail() -> None:
        if rank == "2":
            raise InputError("no space on the second node")

    distributed.work_once(make)
    (directory / f"answers-{rank}").write_text(" ".join(distributed.ask_nodes(lambda: rank)))
    try:
        distributed.work_once(fail)
    except InputError as error:
        (directory / f"said-{rank}").write_text(str(error))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("once")
    spawn(work, 3, place)
    return place


def test_one_process_a_node_works_and_rank_0_first(directory: Path) -> None:
    assert sorted(file.name for file in directory.glob("began-*")) == ["began-0", "began-2"]
    ended, began = (float((directory / name).read_text()) for name in ("ended-0", "began-2"))
    assert ended < began


def test_all_fail_where_one_fails(directory: Path) -> None:
    for rank in range(3):
        assert (directory / f"said-{rank}").read_text() == "no space on the second node"


def test_one_process_a_node_answers_for_all(directory: Path) -> None:
    for rank in range(3):
        assert (directory / f"answers-{rank}").read_text() == "0 2"
