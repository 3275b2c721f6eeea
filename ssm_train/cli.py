"""The command line: what each command takes, and what exit code says how it ended."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ssm_train.errors import InputError

DONE, FAILED, BAD_INPUT, REQUEUE, INTERRUPTED = 0, 1, 2, 75, 130
EXIT_CODES = {"finished": DONE, "low_metric": DONE, "stopped": REQUEUE, "bad_loss": FAILED}

SWITCHES = {
    "overwrite": "remove an earlier run of this name first",
    "resume": "go on from the newest valid checkpoint",
    "debug": "8 training examples, 2 evaluation examples, one epoch",
    "lock": "own the run directory: a second process leaves",
}
VALUES = {
    "model": "hub id, directory, or a run config whose result is the model",
    "prec": "bf16, fp16 or fp32",
    "device": "auto, cpu, cuda or cuda:1",
}

EPILOG = """exit codes:
  0 done   1 failed   2 bad input   75 saved and wants to be started again   130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Only our own errors keep a traceback."""
    # Read when torch is loaded: threads that wait without spinning, so that busy cores stay usable.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        arguments, rest = build_parser().parse_known_args(argv)
        overrides = [word for word in rest if "=" in word and not word.startswith("-")]
        if unknown := [word for word in rest if word not in overrides]:
            raise InputError(f"unknown argument {unknown[0]!r}; see `ssm-train --help`")
        if overrides and arguments.command != "train":
            raise InputError(f"{overrides[0]!r}: only `ssm-train train` takes key=value")
        arguments.rest = overrides
        return arguments.run(arguments)
    except InputError as error:
        rank = int(os.environ.get("RANK", "0"))
        who = f"error (rank {rank})" if rank else "error"
        for line in str(error).splitlines():
            print(f"{who}: {line}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = Parser(
        prog="ssm-train",
        description="Fine-tune GLA, Mamba-1 and Mamba-2 language models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )

    def add(name: str, run: object, what: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=what[0].lower() + what[1:].partition(".")[0],
            description=what,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        return command

    add_train_arguments(
        add(
            "train",
            train,
            "Train a run config. Writes checkpoints, metrics, a plot and the adapter\n"
            "to <output_root>/<data>_seed<seed>/<config name>.",
            "ssm-train train --cfg cfg/quickstart/gla_lora.yaml learning_rate=1e-3 seed=7",
        )
    )

    evaluate_ = add(
        "eval",
        evaluate,
        "Evaluate a run. Prints the loss and the task's metrics.",
        "ssm-train eval output/benchmark/quickstart_seed42/gla_lora --split test",
    )
    add_run_arguments(evaluate_)
    evaluate_.add_argument("--data", help="other data than the run's (name or path)")
    evaluate_.add_argument("--split", help="train, val or test (default: the run's)")
    evaluate_.add_argument("--json", action="store_true", help="print one JSON object")

    generate_ = add(
        "generate",
        generate,
        "Generate with a run's model. Prints one continuation per prompt.",
        'ssm-train generate output/benchmark/quickstart_seed42/gla_lora --prompt "name : aromi"',
    )
    add_run_arguments(generate_)
    generate_.add_argument("--prompt", action="append", default=[], help="repeat for several")
    generate_.add_argument("--file", type=Path, help="a text file with one prompt a line")
    generate_.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="default: 128"
    )
    generate_.add_argument(
        "--num-beams", type=positive, default=1, metavar="N", help="default: 1, greedy"
    )

    merge_ = add(
        "merge",
        merge,
        "Merge a run's adapter. Writes full weights that any transformers install loads, or\n"
        "mamba_ssm, once it is shown that they compute the same.",
        "ssm-train merge output/benchmark/quickstart_seed42/mamba_lora --out merged/",
    )
    add_run_arguments(merge_, device="cpu")  # kernels of a GPU multiply fp32 in TF32
    merge_.add_argument("--out", type=Path, required=True, help="directory for the weights")
    merge_.add_argument(
        "--format",
        choices=("transformers", "mamba_ssm"),
        default="transformers",
        help="transformers (default), or mamba_ssm's own, for Mamba-1 and Mamba-2",
    )
    merge_.add_argument(
        "--tolerance",
        type=share,
        default=1e-5,
        metavar="X",
        help="largest change of the logits, relative to their size (default: 1e-5)",
    )

    plot_ = add(
        "plot",
        plot,
        "Plot losses and metrics of runs. Draws all runs into one PNG.",
        "ssm-train plot output/benchmark/quickstart_seed42/* --out compare.png",
    )
    plot_.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    plot_.add_argument(
        "--out", type=Path, help="PNG file (default: metrics.png in the first RUN_DIR)"
    )

    report_ = add(
        "report",
        report,
        "Compare runs in one table. Prints a row a run, the best first, and writes the table as\n"
        "text and CSV, and a PNG of the main metrics.",
        "ssm-train report output/benchmark --out compare",
    )
    report_.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="a run, or a directory above runs"
    )
    report_.add_argument(
        "--out", type=Path, help="files without their ends (default: report in the first DIR)"
    )

    plan_ = add(
        "plan",
        plan,
        "Count the GPU memory of a run before it starts: weights, optimizer, activations, logits,\n"
        "and the largest batch that fits; with --gpus also what each engine holds on each of them\n"
        "and sends between them. Needs no GPU, no weights and no data.",
        "ssm-train plan --cfg cfg/warmup/gla_1.3b_packed.yaml --gib 79.2 --gpus 64 --net 50",
    )
    plan_.add_argument(
        "--cfg", type=Path, required=True, metavar="FILE", help="run config (.yaml or .json)"
    )
    plan_.add_argument(
        "--gib", type=float, help="memory of the GPU (default: that of the one here, else 79.2)"
    )
    plan_.add_argument("--gpus", type=positive, metavar="N", help="that train together")
    plan_.add_argument(
        "--net", type=amount, metavar="GB/s", help="that each GPU can send to the others"
    )
    plan_.add_argument(
        "--step-seconds",
        type=amount,
        metavar="S",
        help="of an optimizer step on one GPU, to compare with",
    )

    warmup_ = add(
        "warmup",
        warmup,
        "Tune the kernels for this GPU. Writes the fastest configurations for the shapes of a run\n"
        "to the user's cache directory, where every later run finds them.",
        "ssm-train warmup --cfg cfg/warmup/gla_1.3b_packed.yaml",
    )
    warmup_.add_argument(
        "--cfg", type=Path, required=True, metavar="FILE", help="run config (.yaml or .json)"
    )
    warmup_.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="that compile (default: cores - 2, up to 16)",
    )
    warmup_.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write instead")

    add_slurm_arguments(
        add(
            "slurm",
            slurm,
            "Write a job script for a Slurm cluster. The job saves itself before its time limit,\n"
            "starts again, and goes on. On a terminal, what is missing is asked for.",
            "ssm-train slurm --cfg cfg/sst2/gla_lora.yaml --nodes 2 --gpus-per-node 8 "
            "--time 24:00:00 --engine zero2",
        )
    )

    doctor_ = add(
        "doctor",
        doctor,
        "Show what this machine can run. Lists versions, devices, the kernel that each operation\n"
        "will use, why not a faster one, and what to install.",
        "ssm-train doctor --json",
    )
    doctor_.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cfg", type=Path, required=True, metavar="FILE", help="run config (.yaml or .json)"
    )
    for name, what in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=what)
    for name, what in VALUES.items():
        parser.add_argument(f"--{name}", metavar=name.upper(), help=what)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any other key of the config; HP_* variables win over both",
    )


def add_slurm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg", type=Path, metavar="FILE", help="run config (.yaml or .json)")
    parser.add_argument("--nodes", type=positive, metavar="N", help="nodes of the job")
    parser.add_argument("--gpus-per-node", type=positive, metavar="N", help="GPUs, and processes")
    parser.add_argument(
        "--time", type=time_limit, metavar="HH:MM:SS", help="limit of one start; also D-HH:MM:SS"
    )
    parser.add_argument(
        "--engine",
        help="single, ddp, zero1, zero2, zero3, fsdp2, ..., or the path "
        "of an Accelerate config (default: single for one GPU, else ddp)",
    )
    parser.add_argument("--cpus-per-gpu", type=positive, default=8, metavar="N", help="default: 8")
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}", help="default: the cluster's")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option, as --sbatch=--mem=200G; repeat for several",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: <config name>.sh")


def add_run_arguments(parser: argparse.ArgumentParser, device: str = "auto") -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run")
    parser.add_argument(
        "--checkpoint", default="best", metavar="STEP", help="best (default), last or a step"
    )
    parser.add_argument(
        "--device", default=device, help=f"auto, cpu, cuda or cuda:1 (default: {device})"
    )


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def time_limit(text: str) -> str:
    from ssm_train.launch.slurm import read_time

    try:
        read_time(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


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
        print(f"{name:<20} {value:.4f}")
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
    from ssm_train.plot import plot_metrics

    out = arguments.out or arguments.run_dirs[0] / "metrics.png"
    print(plot_metrics([existing(d, marker="metrics.jsonl") for d in arguments.run_dirs], out))
    return DONE


def report(arguments: argparse.Namespace) -> int:
    from ssm_train.report import find_runs, report_runs

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
        "nodes": ("nodes", positive),
        "gpus_per_node": ("GPUs of a node", positive),
        "time": ("limit of one start, HH:MM:SS", time_limit),
    }
    missing = [key for key in questions if getattr(arguments, key) is None]
    if missing and not sys.stdin.isatty():
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
        what = f"holds no {marker}" if run_dir.is_dir() else "does not exist"
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
