"""What the PEFT methods are good for, measured: a, one S6 layer learns another; b, steps to a loss;
c, the gradient norm by rank; d, SST-2 and DART. Each finished job is kept in --out.

    python benchmarks/quality.py b c --out quality.json --jobs 2

goes on where an earlier call stopped, writes quality.md and quality.png beside it, and prints the
tables. `--quick` tries the way with tiny sizes. Part d needs data: --sst2 and --dart name
directories with train, validation (or val) and test JSONL as docs/data.md describes them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Set
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from quality_parts import layer, rank, steps, tasks
from quality_parts.jobs import Found, Job, Options, Part, Results, key_of, name_of

from ssm_train.durable import write_atomically
from ssm_train.errors import InputError

PARTS: dict[str, Part] = {"a": layer, "b": steps, "c": rank, "d": tasks}
PRELOADED = ["transformers", "peft", "accelerate", "ssm_train.train"]


def carry_out(parts: list[str], done: Results, options: Options, jobs: int) -> list[str]:
    """Runs what is missing, `jobs` at a time, each in a process of its own; returns failures."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    failures: dict[str, str] = {}
    running: dict[Future[Found], Job] = {}
    with ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        while True:
            started = {key_of(job) for job in running.values()}
            for job in missing_jobs(parts, done, options, failures.keys() | started):
                running[pool.submit(run_job, job, options)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(future), future.exception()
                if error is None:
                    done.add(job, future.result())
                else:
                    failures[key_of(job)] = f"{type(error).__name__}: {error}"
                print(describe_end(job, done, error, len(running)), flush=True)
    return [f"{job}: {error}" for job, error in failures.items()]


def missing_jobs(parts: list[str], done: Results, options: Options, known: Set[str]) -> list[Job]:
    """What may start now, but for the keys in `known`."""
    found: dict[str, Job] = {}
    for name in parts:
        for job in PARTS[name].next_jobs(done, options):
            if job not in done and key_of(job) not in known:
                found[key_of(job)] = job
    return list(found.values())


def run_job(job: Job, options: Options) -> Found:
    """In a process of its own."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    log = options.work / "logs" / f"{name_of(job)}.txt"
    log.parent.mkdir(exist_ok=True)
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file):
        found: Found = PARTS[job["part"]].run(job, options)
    return {**found, "wall_seconds": time.perf_counter() - began}


def describe_end(job: Job, done: Results, error: BaseException | None, open_jobs: int) -> str:
    name = name_of(job)
    if error is not None:
        return f"FAILED {name}: {error}"
    return f"{name}: {done[job]['wall_seconds']:.0f} s ({open_jobs} more under way or waiting)"


def write_report(parts: list[str], done: Results, options: Options) -> str:
    """`<out>.md` and `<out>.png`; returns the text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(parts), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    texts = []
    for name, axes in zip(parts, figure.subplots(1, len(parts), squeeze=False).flat, strict=True):
        texts += [f"## {PARTS[name].TITLE}", PARTS[name].describe(done, options)]
        PARTS[name].draw(axes, done, options)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    machines = [describe_machine(name, kept) for name, kept in done.machines.items()]
    text = "\n\n".join([*texts, *machines]) + "\n"
    write_atomically(done.path.with_suffix(".md"), text)
    figure.savefig(done.path.with_suffix(".png"), dpi=130)
    return text


def describe_machine(name: str, environment: Any) -> str:
    packages = environment["packages"]
    names = ("torch", "transformers", "peft", "flash-linear-attention")
    return f"Run on {name}: {', '.join(f'{package} {packages[package]}' for package in names)}"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument(
        "--out", type=Path, required=True, help="results, JSON; read if it is there"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--families", nargs="+", choices=("gla", "mamba"), default=["gla", "mamba"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the way")
    parser.add_argument("--report", action="store_true", help="only write the tables of --out")
    parser.add_argument("--sst2", type=Path, help="directory with SST-2, for part d")
    parser.add_argument("--dart", type=Path, help="directory with DART, for part d")
    parser.add_argument("--work", type=Path, help="base models and logs; default: beside --out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kernels", choices=("auto", "triton", "reference"), default="auto")
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    work = arguments.work or arguments.out.with_suffix(".work")
    data = {name: getattr(arguments, name) for name in ("sst2", "dart")}
    options = Options(
        seeds=arguments.seeds,
        quick=arguments.quick,
        families=tuple(arguments.families),
        data={name: path.resolve() for name, path in data.items() if path},
        work=work.resolve(),
        device=arguments.device,
        kernels=arguments.kernels,
    )
    try:
        done = Results.read(arguments.out)
        failures = []
        if not arguments.report:
            options.work.mkdir(parents=True, exist_ok=True)
            done.forget_bases(options)
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are small
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            failures = carry_out(arguments.parts, done, options, arguments.jobs)
        print(write_report(arguments.parts, done, options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
