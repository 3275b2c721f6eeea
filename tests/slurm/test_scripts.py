"""Slurm takes every script: those of slurm/ as they are, and what `ssm-train slurm` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from slurm_runs import ROOT, VARIABLES, Runs
from tiny_runs import losses, write_config

from ssm_train.cli import main
from ssm_train.commands import DONE

SHIPPED = ("train_single_node.sh", "train_multi_node.sh", "--array=1-8%4 sweep_array.sh")


def ask_slurm(cluster: Cluster, *words: str) -> str:
    done = cluster.ask("sbatch", "--test-only", *words)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("words", SHIPPED)
def test_slurm_takes_the_shipped_scripts(cluster: Cluster, words: str) -> None:
    *options, script = words.split()
    nodes = "node[1-2]" if "multi" in script else "node1"
    assert f"nodes {nodes} in partition" in ask_slurm(cluster, *options, f"{ROOT}/slurm/{script}")


def test_a_written_script_trains(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From another directory than the one it was made in, with changes behind its name."""
    monkeypatch.chdir(ROOT)
    config, out = write_config(tmp_path, "gla", "gla"), tmp_path / "my job.sh"
    flags = ["--nodes", "2", "--gpus-per-node", "1", "--time", "0:10:00", "--cpus-per-gpu", "1"]
    assert main(["slurm", "--cfg", str(config), *flags, "--out", str(out)]) == DONE
    ask_slurm(runs.cluster, str(out))
    job = runs.cluster.submit(str(out), "max_steps=4", cwd=tmp_path, **VARIABLES)
    assert runs.cluster.wait(job) == ("COMPLETED", 0)
    assert len(losses(runs.run_dir("gla"))) == 4
    assert "2 processes on cpu" in (tmp_path / f"gla-{job}.out").read_text()


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("train_single_node.sh", [], "error: no run config"),
        ("train_multi_node.sh", ["x.yaml"], "many_nodes/zero_bf16.yaml does not exist"),
        ("sweep_array.sh", ["runs.txt"], "submit it with --array=1-N"),
    ],
)
def test_what_is_missing_is_named(runs: Runs, script: str, words: list[str], says: str) -> None:
    job = runs.submit(f"slurm/{script}", *words, options=(f"--output={runs.directory}/%j.out",),
                      ENGINE="zero", PREC="bf16")  # fmt: skip
    state, code = runs.cluster.wait(job)
    assert state == "FAILED" and code in (1, 2, 127)
    assert says in runs.said(job)
