"""Jobs of one test on the cluster: submitted as a person would, but on the CPU, with one training
process a node."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster, wait_until
from tiny_runs import losses

ROOT = Path(__file__).parents[2]
VARIABLES = {
    "PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "ENGINE": "zero2",
    "PREC": "fp32",
    "SECONDS_TO_END": "20",
    # The tests' cache is a new one each time; what DeepSpeed compiles (a minute) is kept.
    "SSM_TRAIN_CACHE": os.environ["XDG_CACHE_HOME"],
    "XDG_CACHE_HOME": str(Path.home() / ".cache"),
}
MULTI, SINGLE, SWEEP = (
    f"slurm/{name}.sh" for name in ("train_multi_node", "train_single_node", "sweep_array")
)


@dataclass(frozen=True)
class Runs:
    """Jobs of one test, with their configs, outputs and runs in one directory."""

    cluster: Cluster
    directory: Path

    def submit(self, script: str, *words: str, options: tuple[str, ...] = (), **more: str) -> str:
        """One training process a node."""
        out = self.directory / ("%A_%a.out" if script == SWEEP else "%j.out")
        command = ["--gpus-per-node=1", "--cpus-per-task=1", f"--output={out}", *options]
        return self.cluster.submit(*command, script, *words, cwd=ROOT, **VARIABLES | more)

    def said(self, job: str) -> str:
        return (self.directory / f"{job}.out").read_text(encoding="utf-8")

    def run_dir(self, name: str) -> Path:
        return self.directory / "output" / "train_seed42" / name

    def wait_for_step(self, name: str, step: int) -> None:
        file = self.run_dir(name) / "metrics.jsonl"
        wait_until(
            lambda: file.exists() and len(losses(self.run_dir(name))) >= step, 120, "no step"
        )

    def signal(self, job: str) -> None:
        """What Slurm sends by itself before the limit."""
        asked = self.cluster.ask("scancel", "--signal=USR1", "--batch", job)
        assert asked.returncode == 0, asked.stderr

    def wait_for_the_end(self, job: str) -> None:
        wait_until(lambda: not self.cluster.processes(job), 30, "processes are left")
