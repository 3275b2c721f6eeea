"""The scripts of slurm/ train tiny models on two nodes of a real Slurm: to the end, over a requeue,
after a kill, as an array."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, wait_until
from slurm_runs import MULTI, ROOT, SINGLE, SWEEP, Runs
from tiny_runs import LORA, assert_same_tensors, exported, losses, write_config

STEPS = {"max_steps": 150, "eval_steps": 75, "save_steps": 1000, "batch_size": 2, "peft": LORA}
FOREVER = STEPS | {"max_steps": 100_000, "eval_steps": 100_000}


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A GLA that trained under ZeRO-2 on two nodes without an interruption."""
    runs = Runs(cluster, tmp_path_factory.mktemp("whole"))
    job = runs.submit(MULTI, str(write_config(runs.directory, "gla", "gla", **STEPS)))
    assert cluster.wait(job, 240) == ("COMPLETED", 0), runs.said(job)
    assert "2 processes on cpu under ZeRO-2" in runs.said(job)
    return runs


def test_two_nodes_train_a_gla(whole: Runs) -> None:
    check_whole(whole, "gla")


def test_two_nodes_train_a_mamba(runs: Runs) -> None:
    job = runs.submit(MULTI, str(write_config(runs.directory, "mamba", "mamba", **STEPS)))
    assert runs.cluster.wait(job) == ("COMPLETED", 0), runs.said(job)
    check_whole(runs, "mamba")


def check_whole(runs: Runs, name: str) -> None:
    record = json.loads((runs.run_dir(name) / "environment.json").read_text())
    assert record["engine"] == "ZeRO-2" and record["processes"] == 2
    found = losses(runs.run_dir(name))
    assert len(found) == 150 and sum(found[-20:]) < sum(found[:20])


def test_a_job_near_its_limit_is_saved_requeued_and_trains_the_same(
    runs: Runs, whole: Runs
) -> None:
    job = runs.submit(MULTI, str(write_config(runs.directory, "gla", "gla", **STEPS)))
    runs.wait_for_step("gla", 20)
    runs.signal(job)
    assert runs.cluster.wait(job) == ("COMPLETED", 0), runs.said(job)
    said = runs.said(job)
    assert "saved; restart 1 of at most 20 follows" in said and "restart 1 of at most 20" in said
    for node in ("node1", "node2"):
        assert re.search(rf"^node {node}: rank \d saved itself", said, re.M), said
    assert runs.cluster.facts(job)["Restarts"] == "1"
    first, second = runs.run_dir("gla"), whole.run_dir("gla")
    assert losses(first) == losses(second)
    assert_same_tensors(exported(first), exported(second))


def test_the_real_limit_and_the_budget_of_restarts(runs: Runs) -> None:
    """Slurm itself sends the signal; a job without restarts left says how to go on."""
    config = write_config(runs.directory, "mamba", "mamba", **FOREVER)
    job = runs.submit(
        SINGLE, str(config), options=("--time=1", "--signal=B:USR1@5"),
        ENGINE="single", MAX_RESTARTS="0",
    )  # fmt: skip
    assert runs.cluster.wait(job) == ("FAILED", 75), runs.said(job)
    said = runs.said(job)
    assert "USR1: the run is asked to save itself" in said
    assert "saved, but already restarted 0 times (MAX_RESTARTS=0); submit it again" in said
    steps = len(losses(runs.run_dir("mamba")))
    assert (runs.run_dir("mamba") / "checkpoints" / "last").read_text().split() == [
        f"step-{steps:08}"
    ]


def test_a_start_over_the_budget_trains_nothing(runs: Runs) -> None:
    """Slurm itself starts a job again when a node fails, whatever the script would say."""
    config = str(write_config(runs.directory, "gla", "gla", **FOREVER))
    job = runs.submit(SINGLE, config, ENGINE="single", MAX_RESTARTS="0")
    runs.wait_for_step("gla", 1)
    assert runs.cluster.ask("scontrol", "requeue", job).returncode == 0
    assert runs.cluster.wait(job) == ("FAILED", 1), runs.said(job)
    assert "start number 2 is over the budget (MAX_RESTARTS=0)" in runs.said(job)


def test_a_signal_that_comes_while_tasks_start_is_not_lost(runs: Runs) -> None:
    """Neither while bash starts on a node, here for some seconds, nor while the model loads."""
    slow = runs.directory / "slow.sh"
    slow.write_text("[[ ${SLURM_PROCID:-0} == 0 ]] || sleep 3\n")
    config = str(write_config(runs.directory, "gla", "gla", **FOREVER))
    job = runs.submit(MULTI, config, ENGINE="ddp", MAX_RESTARTS="0", BASH_ENV=str(slow))
    wait_until(
        lambda: any("ssm_train.train" in words for words in runs.cluster.processes(job).values()),
        30,
    )
    runs.signal(job)
    assert runs.cluster.wait(job) == ("FAILED", 75), runs.said(job)
    assert (runs.run_dir("gla") / "checkpoints" / "last").exists()


def test_a_cancelled_job_leaves_no_process_and_stays_cancelled(runs: Runs) -> None:
    config = write_config(runs.directory, "gla", "gla", **FOREVER)
    job = runs.submit(MULTI, str(config), ENGINE="ddp")
    runs.wait_for_step("gla", 1)
    assert sum("ssm_train.train" in words for words in runs.cluster.processes(job).values()) >= 4
    assert runs.cluster.ask("scancel", job).returncode == 0
    runs.wait_for_the_end(job)
    assert runs.cluster.wait(job)[0] == "CANCELLED"
    said = runs.said(job)
    assert "follows" not in said and "Traceback" not in said


def test_a_killed_rank_ends_the_job_and_its_node_is_named(runs: Runs) -> None:
    config = write_config(runs.directory, "gla", "gla", **FOREVER)
    job = runs.submit(MULTI, str(config), ENGINE="ddp")
    runs.wait_for_step("gla", 1)
    os.kill(training_process(runs, job, node=1), signal.SIGKILL)
    state, code = runs.cluster.wait(job)
    said = runs.said(job)
    assert (state, code) == ("FAILED", 128 + signal.SIGKILL), said
    assert "node node2: rank 1 was killed by SIGKILL" in said
    assert f"job {job}: failed with exit code 137" in said
    runs.wait_for_the_end(job)


def training_process(runs: Runs, job: str, node: int) -> int:
    for pid, words in runs.cluster.processes(job).items():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={node}".encode() in variables and "ssm_train.train" in words:
            return pid
    raise AssertionError("no training process")


def test_an_array_runs_a_suite_and_requeues_one_element_alone(runs: Runs) -> None:
    (runs.directory / "yaml").mkdir()
    for name, steps in (("short", 8), ("long", 300)):
        family = {"short": "mamba", "long": "gla"}[name]
        config = write_config(runs.directory, name, family, **STEPS | {"max_steps": steps})
        config.rename(runs.directory / "yaml" / config.name)
    (runs.directory / "suites.yaml").write_text("E1: [short, long]\n")
    lines = subprocess.run(
        [sys.executable, "-m", "ssm_train.launch.slurm_sweep", "E1"],
        env={**os.environ, "EXP_ROOT": str(runs.directory), "DATA": "", "FORCE_SEED": "42"},
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert [line.split()[1] for line in lines.splitlines()] == ["seed=42", "seed=42"]
    (runs.directory / "runs.txt").write_text(lines)

    array = runs.submit(
        SWEEP, str(runs.directory / "runs.txt"), options=("--array=1-2",), ENGINE="single"
    )
    runs.wait_for_step("long", 5)
    runs.signal(f"{array}_2")  # the last one has the array's id
    for element in (1, 2):
        state = runs.cluster.wait(f"{array}_{element}")
        assert state == ("COMPLETED", 0), runs.said(f"{array}_{element}")
    assert runs.cluster.facts(f"{array}_1")["Restarts"] == "0"
    assert runs.cluster.facts(f"{array}_2")["Restarts"] == "1"
    assert [len(losses(runs.run_dir(name))) for name in ("short", "long")] == [8, 300]
