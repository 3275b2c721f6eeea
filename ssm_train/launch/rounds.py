"""Runs a suite: its rounds in order, the jobs of a round side by side, and what is printed about
them. `python -m ssm_train.launch.rounds E1 all` is `gla_round_new.sh E1 all`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from ssm_train.commands import DONE, FAILED, INTERRUPTED
from ssm_train.errors import InputError
from ssm_train.launch.complete import find_complete_run, report_suite
from ssm_train.launch.interrupt import Interrupt
from ssm_train.launch.jobs import (
    Job,
    Started,
    describe_end,
    read_tail,
    start_job,
    stop_jobs,
    wait_for_jobs,
)
from ssm_train.launch.plan import Plan, plan_suite
from ssm_train.launch.slots import CPU
from ssm_train.strict_yaml import dump, read_document
from ssm_train.terminal import say

Outcome = Literal["done", "failed", "interrupted"]

USAGE = """usage: gla_round_new.sh [SUITE] [ROUND ...|all] [--skip-done]

  SUITE        E1, E2, ...: a list of configs in $EXP_ROOT/suites.yaml; without it, all of them
  ROUND        one number or several; without it all rounds of a SUITE, or round 1 of all suites
  --skip-done  leave out jobs whose run is complete and of the same config

variables: DATA FORCE_SEED GPU_IDS GPU_PLAN EXP_ROOT CFG_DIR PEFT_DIR LOG_DIR PYTHON STOP_GRACE
exit codes: 0 done, 1 failed or bad input, 130 interrupted. More in docs/suites.md.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite that the words ask for; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if "-h" in words or "--help" in words:
        sys.stdout.write(USAGE)
        return DONE
    try:
        plan = plan_suite(words, os.environ)
        with Interrupt() as interrupt, TemporaryDirectory(prefix="suite-") as directory:
            rounds = {
                number: make_jobs(plan, configs, Path(directory))
                for number, configs in plan.rounds.items()
            }
            return run_suite(plan, rounds, interrupt)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return FAILED


def make_jobs(plan: Plan, configs: Sequence[str], directory: Path) -> list[Job]:
    """The jobs of one round: job i on slot i, its config copied into `directory`."""
    jobs = []
    for config, device in zip(configs, plan.slots.devices, strict=False):
        copy, data = copy_config(Path(plan.cfg_dir) / config, directory, plan.data)
        log = plan.log_dir / f"{Path(config).stem}.log"
        jobs.append(Job(config, copy, data, device, job_environment(plan, device), log))
    return jobs


def copy_config(source: Path, directory: Path, data: str) -> tuple[Path, str]:
    """(a copy under the same name, with `data` unless that is empty; the data in it)."""
    values = dict(read_document(source).values)
    if data:
        values["data"] = data
    copy = directory / source.name
    copy.write_text(dump(values), encoding="utf-8")
    return copy, str(values.get("data"))


def job_environment(plan: Plan, device: str) -> dict[str, str]:
    """Ours, with the seed and the device; cores are shared among the slots."""
    shared = {"PYTHONUNBUFFERED": "1"}  # so that a log can be followed
    if (n_slots := len(plan.slots.devices)) > 1:
        shared["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n_slots))
    own = {"HP_SEED": str(plan.seed), "CUDA_VISIBLE_DEVICES": "" if device == CPU else device}
    return {**shared, **os.environ, **own}


def run_suite(plan: Plan, rounds: dict[int, list[Job]], interrupt: Interrupt) -> int:
    """All rounds asked for, until one fails; then the table and, unless all went well, the
    summary. Returns the exit code."""
    for config in plan.repeated:
        say(f"{config} stands more than once in suite {plan.suite}; it runs once")
    completed: list[int] = []
    present: list[tuple[Job, bool]] = []
    outcome: Outcome = "done"
    for number, jobs in rounds.items():
        if plan.skip_done:
            jobs, complete = leave_out_complete(jobs)
            present += [(job, False) for job in complete]
        outcome, started = run_round(plan, number, jobs, interrupt)
        present += [(one.job, True) for one in started]
        if outcome != "done":
            break
        completed.append(number)
    if outcome != "interrupted":
        runs = [(job.copy, job.environment, here) for job, here in present]
        if table := report_suite(runs, plan.log_dir / "report"):
            say(table)
    if outcome == "done":
        return DONE
    say("SUMMARY:")
    say(f"  Experiments completed: {' '.join(map(str, completed)) or 'none'}.")
    if outcome == "interrupted":
        say(f"  Experiment {number} exited abnormally (interrupted).")
        return INTERRUPTED
    say(f"  Experiment {number} failed. Stopping.")
    return FAILED


def leave_out_complete(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """(jobs to run, jobs whose run is complete); says why of each."""
    left: list[Job] = []
    complete: list[Job] = []
    for job in jobs:
        run_dir, reason = find_complete_run(job.copy, job.environment)
        if run_dir is None:
            say(f"{label(job)}  runs: {reason}")
            left.append(job)
        else:
            say(f"{label(job)}  skipped: {run_dir} is complete")
            complete.append(job)
    return left, complete


def run_round(
    plan: Plan, number: int, jobs: Sequence[Job], interrupt: Interrupt
) -> tuple[Outcome, list[Started]]:
    """One round to its end, and the jobs that it started; leaves no process behind."""
    running: list[Started] = []
    if interrupt:
        return "interrupted", running
    began = time.monotonic()
    print_header(plan, number, len(jobs))
    try:
        for job in jobs:
            if interrupt:
                break
            say(f"{label(job)}  (HP_SEED={plan.seed}; data={job.data})")
            running.append(start_job(job, plan.python))
        for started in wait_for_jobs(running, interrupt):
            print_end(started, interrupted=False)
    finally:
        left = [started for started in running if started.process.returncode is None]
        stop_jobs(running, plan.stop_grace)
    for started in left:
        print_end(started, interrupted=True)
    seconds = time.monotonic() - began
    say(f"{now()} ROUND={number} END elapsed={clock(seconds)} ({int(seconds)}s)")
    if left or len(running) < len(jobs):
        return "interrupted", running
    if any(started.process.returncode for started in running):
        return "failed", running
    say(f"ROUND={number} finished (all ran with HP_SEED={plan.seed}).")
    return "done", running


def print_header(plan: Plan, number: int, n_jobs: int) -> None:
    slots = plan.slots
    say(
        f"=== Starting Round {number} ({n_jobs} jobs; FORCE_SEED={plan.seed}; "
        f"NUM_GPUS={len(slots.gpus)}; N_SLOTS={len(slots.devices)}) ==="
    )
    say(f"SUITE   = {plan.suite}")
    say(f"CFG_DIR = {plan.cfg_dir}")
    say(f"PEFT_DIR= {plan.peft_dir}")
    say(f"GPUs    = {' '.join(slots.gpus) or 'none'}")
    say(f"PLAN    = {' '.join(map(str, slots.plan))}")
    say(f"SLOTS   = {' '.join(slots.devices)}")
    say(f"DATA    = {plan.data or 'of each config'}")
    say(f"LOGS    = {plan.log_dir}")
    say(f"{now()} ROUND={number} START")


def print_end(started: Started, interrupted: bool) -> None:
    """One line for a job that ended, and the end of its log where it failed."""
    job = started.job
    took = clock(time.monotonic() - started.began)
    say(f"{label(job)}  {describe_end(started, interrupted)} in {took}")
    if started.process.returncode and not interrupted:
        say(f"  the end of {job.log}:")
        for line in read_tail(job.log):
            say(f"    {line}")


def label(job: Job) -> str:
    device = CPU if job.device == CPU else f"GPU {job.device}"
    return f"[{device}] {job.config}"


def now() -> str:
    return f"[{datetime.now():%Y-%m-%d_%H:%M:%S}]"


def clock(seconds: float) -> str:
    """HH:MM:SS."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{s:02}"


if __name__ == "__main__":
    sys.exit(main())
