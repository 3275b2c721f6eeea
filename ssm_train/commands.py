"""What each command does, and what exit code says how it ended."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssm_train import argument_types
from ssm_train.errors import InputError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
REQUEUE = 75  # saved itself, and wants to be started again
EXIT_CODES = {"finished": DONE, "low_metric": DONE, "stopped": REQUEUE, "bad_loss": FAILED}

SWITCHES = {
    "overwrite": "remove an earlier run of this name first",
    "resume": "go on from the newest valid checkpoint",
    "debug": "8 training examples, 2 evaluation examples, one epoch",
    "lock": "own the run directory from the first moment, on every host",
}
VALUES = {
    "model": "hub id, directory, or a run config whose result is the model",
    "prec": "bf16, fp16 or fp32",
    "device": "auto, cpu, cuda or cuda:1",
}


def overrides_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Flags and `key=value` words of the train command as config texts."""
    found = {name: "true" for name in SWITCHES if getattr(arguments, name)}
    found |= {name: text for name in VALUES if (text := getattr(arguments, name)) is not None}
    for word in [*arguments.overrides, *arguments.rest]:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise InputError(f"{word!r} is not key=value, such as learning_rate=1e-3")
        if key in found:
            raise InputError(f"{key} is given twice on the command line; keep one")
        found[key] = text
    return found


def way_out(argument: str, command: str) -> str:
    """What to do about an unknown argument: a key of the config is given in another way."""
    from ssm_train.config import RunConfig

    key, _, value = argument.lstrip("-").replace("-", "_").partition("=")
    if command == "train" and key in RunConfig.model_fields:
        return f"a key of the config is given without dashes: {key}={value or '...'}"
    return f"see `ssm-train {command} --help`"


def train(arguments: argparse.Namespace) -> int:
    from ssm_train.config import load_config
    from ssm_train.overrides import unread_variables

    cfg, provenance = load_config(arguments.cfg, overrides_of(arguments), os.environ)
    for note in unread_variables(os.environ) if os.environ.get("RANK", "0") == "0" else ():
        print(note, flush=True)

    from ssm_train.train import run

    outcome = run(cfg, provenance, arguments.cfg).outcome
    if outcome == "stopped" and cfg.no_save:  # nothing to go on from
        return INTERRUPTED
    return EXIT_CODES[outcome]


def evaluate(arguments: argparse.Namespace) -> int:
    run_dir = existing(arguments.run_dir)

    from ssm_train.finished import evaluate_run

    metrics = evaluate_run(
        run_dir,
        data=arguments.data,
        split=arguments.split,
        checkpoint=arguments.checkpoint,
        device=arguments.device,
    )
    if arguments.json:
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        print(json.dumps(finite, allow_nan=False))
        return DONE
    for name, value in metrics.items():
        print(f"{name:<20} {value if isinstance(value, int) else f'{value:.4f}'}")
    return DONE


def generate(arguments: argparse.Namespace) -> int:
    prompts = [*arguments.prompt, *(prompts_in(arguments.file) if arguments.file else [])]
    if not prompts:
        raise InputError('no prompts; give --prompt "..." or --file prompts.txt')
    run_dir = existing(arguments.run_dir)

    from ssm_train.finished import generate_from

    for text in generate_from(
        run_dir,
        prompts,
        checkpoint=arguments.checkpoint,
        device=arguments.device,
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
    ):
        print(text)
    return DONE


def merge(arguments: argparse.Namespace) -> int:
    run_dir, out = existing(arguments.run_dir), arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} already exists and is not an empty directory")

    from ssm_train.finished import merge_run

    difference = merge_run(
        run_dir,
        out,
        checkpoint=arguments.checkpoint,
        device=arguments.device,
        file_format=arguments.format,
        tolerance=arguments.tolerance,
    )
    print(f"merged weights are in {out}; logits differ by {difference:.1e} of their size")
    return DONE


def plot(arguments: argparse.Namespace) -> int:
    from ssm_train.record.plot import plot_metrics

    beside = [d for d in arguments.run_dirs if d.is_file()]  # as `*` brings them
    given = [d for d in arguments.run_dirs if d not in beside] or beside
    out = arguments.out or given[0] / "metrics.png"
    print(plot_metrics([existing(d, marker="metrics.jsonl") for d in given], out))
    return DONE


def report(arguments: argparse.Namespace) -> int:
    from ssm_train.record.report import find_runs, report_runs

    out = arguments.out or arguments.directories[0] / "report"
    print(report_runs(find_runs(arguments.directories), out))
    return DONE


def plan(arguments: argparse.Namespace) -> int:
    from ssm_train.config import load_config

    if arguments.gpus is None and (arguments.net or arguments.step_seconds):
        raise InputError("--net and --step-seconds are for several GPUs; say how many with --gpus")
    cfg, _ = load_config(arguments.cfg, {}, os.environ)

    from ssm_train import scaling
    from ssm_train.plan import GIB, describe, fit_tokens, make_plan, memory_of_gpu

    memory = memory_of_gpu() if arguments.gib is None else arguments.gib * GIB
    cfg, lines = fit_tokens(cfg, memory)
    counted = make_plan(cfg)
    lines += describe(counted, memory, cfg)
    if arguments.gpus is not None:
        bandwidth = arguments.net and arguments.net * scaling.GB
        cluster = scaling.Cluster(arguments.gpus, memory, bandwidth, arguments.step_seconds)
        lines += ["", *scaling.describe(scaling.look_ahead(cfg, counted, cluster))]
    for line in lines:
        print(line)
    return DONE


def warmup(arguments: argparse.Namespace) -> int:
    from ssm_train.config import load_config

    cfg, _ = load_config(arguments.cfg, {}, os.environ)

    from ssm_train.warmup import tune

    tune(cfg, arguments.processes, arguments.out)
    return DONE


def verify_resume(arguments: argparse.Namespace) -> int:
    from ssm_train.config import load_config

    cfg, _ = load_config(arguments.cfg, {}, os.environ)

    from ssm_train.verify_resume import verify

    say = print if os.environ.get("RANK", "0") == "0" else lambda line: None
    difference = verify(cfg, arguments.steps, say)
    if difference is not None:
        say(f"not the same: {difference}")
        return FAILED
    say(
        "the same, bit for bit: examples and losses of every step, parameters, optimizer and "
        "random states"
    )
    return DONE


def rerun(arguments: argparse.Namespace) -> int:
    run_dir = existing(arguments.run_dir).resolve()
    out = arguments.out or run_dir.with_name(f"{run_dir.name}-rerun")

    from ssm_train.rerun import rerun

    difference = rerun(run_dir, out.resolve(), arguments.losses, arguments.whole, print)
    if difference is not None:
        print(f"not the same: {difference}")
        return FAILED
    return DONE


def slurm(arguments: argparse.Namespace) -> int:
    from ssm_train.launch.slurm import Job, find_accelerate_config, write_job

    asked = what_the_job_asks_for(arguments)

    from ssm_train.config import load_config

    cfg, _ = load_config(asked["cfg"], {}, os.environ)
    alone = asked["nodes"] * asked["gpus_per_node"] == 1
    engine = arguments.engine or ("single" if alone else "ddp")
    job = Job(
        **asked,
        accelerate_config=find_accelerate_config(engine, cfg.prec, asked["nodes"]),
        cpus_per_gpu=arguments.cpus_per_gpu,
        partition=arguments.partition,
        account=arguments.account,
        qos=arguments.qos,
        more=tuple(arguments.sbatch),
    )
    out = arguments.out or Path(f"{job.cfg.stem}.sh")
    write_job(job, out)
    print(f"wrote {out}; submit it with: sbatch {shlex.quote(str(out))}")
    return DONE


def what_the_job_asks_for(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values that have no default: from flags, or from the person at the terminal."""
    from ssm_train.launch.slurm import ask

    questions: dict[str, tuple[str, Callable[[str], object]]] = {
        "cfg": ("run config", Path),
        "nodes": ("nodes", argument_types.positive),
        "gpus_per_node": ("GPUs of a node", argument_types.positive),
        "time": ("limit of one start, HH:MM:SS", argument_types.time_limit),
    }
    missing = [key for key in questions if getattr(arguments, key) is None]
    if missing and not (sys.stdin and sys.stdin.isatty()):  # None: it was closed
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in missing)
        raise InputError(f"give {flags}; what is missing is asked for on a terminal only")
    return {
        key: ask(*question) if key in missing else getattr(arguments, key)
        for key, question in questions.items()
    }


def doctor(arguments: argparse.Namespace) -> int:
    from ssm_train.doctor import examine, show

    findings = examine()
    if arguments.json:
        print(json.dumps(findings, indent=2))
    else:
        show(findings)
    return DONE


def existing(run_dir: Path, marker: str = "cfg.yaml") -> Path:
    """The run directory, after a look at whether it is one; for metrics that of the warm-up where
    a run is still in it."""
    if marker == "metrics.jsonl" and not (run_dir / marker).is_file():
        from ssm_train.record import WARMUP

        warming_up = run_dir / WARMUP
        run_dir = warming_up if (warming_up / marker).is_file() else run_dir
    if not (run_dir / marker).is_file():
        what = "is a file" if run_dir.is_file() else "does not exist"
        what = f"holds no {marker}" if run_dir.is_dir() else what
        raise InputError(f"RUN_DIR {run_dir} {what}; give the directory of a finished run")
    return run_dir


def prompts_in(file: Path) -> list[str]:
    if not file.is_file():
        raise InputError(f"--file {file} does not exist; give a text file with one prompt a line")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"--file {file} is not UTF-8 text") from None
    return [line for line in lines if line.strip()]
