"""The command line: which commands there are, and what each takes."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ssm_train import __version__, commands
from ssm_train.commands import BAD_INPUT, INTERRUPTED
from ssm_train.errors import InputError, unusable
from ssm_train.secrets import redact
from ssm_train.terminal import printable

EPILOG = """exit codes:
  0 done   1 failed   2 bad input   75 saved and wants to be started again   130 interrupted
"""

OTHER_PYTHON = "activate the environment that has ssm_train, or install it: pip install -e ."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Only our own errors keep a traceback."""
    try:
        check_python()
        return run(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ssm_train"):
            raise
        return refuse(InputError(f"{sys.executable} has no {error.name}; {OTHER_PYTHON}"))
    except InputError as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if (refusal := unusable(error)) is None:
            raise
        return refuse(refusal)


def check_python() -> None:
    """What is imported up to here has to load in older Pythons too."""
    if sys.version_info < (3, 11):  # noqa: UP036
        version = ".".join(map(str, sys.version_info[:3]))
        raise InputError(f"{sys.executable} is Python {version}, not 3.11 to 3.13; {OTHER_PYTHON}")


def run(argv: Sequence[str] | None) -> int:
    # Read when torch is loaded: threads that wait without spinning, so that busy cores stay usable.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.umask(os.umask(0) | 0o002)  # nothing that a run writes may be changed by everybody
    arguments, rest = build_parser().parse_known_args(argv)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if unknown := [word for word in rest if word not in overrides]:
        hint = commands.way_out(unknown[0], arguments.command)
        raise InputError(f"unknown argument {unknown[0]!r}; {hint}")
    if overrides and arguments.command != "train":
        raise InputError(f"{overrides[0]!r}: only `ssm-train train` takes key=value")
    arguments.rest = overrides
    return arguments.run(arguments)


def refuse(error: InputError) -> int:
    rank = int(os.environ.get("RANK", "0"))
    who = f"error (rank {rank})" if rank else "error"
    for line in str(error).split("\n"):
        print(f"{who}: {printable(redact(line))}", file=sys.stderr)
    return BAD_INPUT


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
    parser.add_argument("--version", action="version", version=f"ssm_train {__version__}")
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )

    def add(name: str, run: object, what: str, example: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
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
            commands.train,
            "Train a run config. Writes checkpoints, metrics, a plot and the adapter\n"
            "to <output_root>/<data>_seed<seed>/<config name>.",
            "ssm-train train --cfg cfg/quickstart/gla_lora.yaml learning_rate=1e-3 seed=7",
        )
    )

    evaluate_ = add(
        "eval",
        commands.evaluate,
        "Evaluate a run. Prints the loss and the task's metrics.",
        "ssm-train eval output/quickstart/quickstart_seed42/gla_lora --split test",
    )
    add_run_arguments(evaluate_)
    evaluate_.add_argument("--data", help="other data than the run's (name or path)")
    evaluate_.add_argument("--split", help="train, val or test (default: the run's)")
    evaluate_.add_argument("--json", action="store_true", help="print one JSON object")

    generate_ = add(
        "generate",
        commands.generate,
        "Generate with a run's model. Prints one continuation per prompt.",
        "ssm-train generate output/quickstart/quickstart_seed42/gla_lora --prompt "
        '"port : gdansk | kind : clipper | cargo : wine | ship : kestrel | colour : blue =>"',
    )
    add_run_arguments(generate_)
    generate_.add_argument("--prompt", action="append", default=[], help="repeat for several")
    generate_.add_argument("--file", type=Path, help="a text file with one prompt a line")
    generate_.add_argument(
        "--max-new-tokens", type=commands.positive, default=128, metavar="N", help="default: 128"
    )
    generate_.add_argument(
        "--num-beams", type=commands.positive, default=1, metavar="N", help="default: 1, greedy"
    )

    merge_ = add(
        "merge",
        commands.merge,
        "Merge a run's adapter. Writes full weights that any transformers install loads, or\n"
        "mamba_ssm, once it is shown that they compute the same.",
        "ssm-train merge output/quickstart/quickstart_seed42/mamba_lora --out merged/",
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
        commands.plot,
        "Plot losses and metrics of runs. Draws all runs into one PNG.",
        "ssm-train plot output/quickstart/quickstart_seed42/* --out compare.png",
    )
    plot_.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    plot_.add_argument(
        "--out", type=Path, help="PNG file (default: metrics.png in the first RUN_DIR)"
    )

    report_ = add(
        "report",
        commands.report,
        "Compare runs in one table. Prints a row a run, the best first, and writes the table as\n"
        "text and CSV, and a PNG of the main metrics.",
        "ssm-train report output/quickstart --out compare",
    )
    report_.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="a run, or a directory above runs"
    )
    report_.add_argument(
        "--out", type=Path, help="files without their ends (default: report in the first DIR)"
    )

    plan_ = add(
        "plan",
        commands.plan,
        "Count the GPU memory of a run before it starts. Lists weights, optimizer, activations,\n"
        "logits, and the largest batch that fits; with --gpus also what each engine holds on each\n"
        "of them and sends between them. Needs no GPU, no weights (of a model only its\n"
        "config.json) and no data.",
        "ssm-train plan --cfg cfg/warmup/gla_1.3b_packed.yaml --gib 79.2 --gpus 64 --net 50",
    )
    plan_.add_argument(
        "--cfg", type=Path, required=True, metavar="FILE", help="run config (.yaml or .json)"
    )
    plan_.add_argument(
        "--gib", type=amount, help="memory of the GPU (default: that of the one here, else 79.2)"
    )
    plan_.add_argument(
        "--gpus", type=commands.positive, metavar="N", help="GPUs that train together"
    )
    plan_.add_argument(
        "--net", type=amount, metavar="GB/s", help="what each GPU can send to the others"
    )
    plan_.add_argument(
        "--step-seconds",
        type=amount,
        metavar="S",
        help="seconds of an optimizer step on one GPU, to compare with",
    )

    warmup_ = add(
        "warmup",
        commands.warmup,
        "Tune the kernels for this GPU. Writes the fastest configurations for the shapes of a run\n"
        "to the user's cache directory, where every later run finds them.",
        "ssm-train warmup --cfg cfg/warmup/gla_1.3b_packed.yaml",
    )
    warmup_.add_argument(
        "--cfg", type=Path, required=True, metavar="FILE", help="run config (.yaml or .json)"
    )
    warmup_.add_argument(
        "--processes",
        type=commands.positive,
        metavar="N",
        help="processes that compile (default: cores - 2, up to 16)",
    )
    warmup_.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write instead")

    verify_ = add(
        "verify-resume",
        commands.verify_resume,
        "Prove that stopping changes nothing. Trains some steps of a run in one go, and again\n"
        "killed twice and resumed, in a temporary directory, and compares bit for bit; exits 1\n"
        "where anything differs, and says what comes first. Under several processes: started by\n"
        "their launcher, with -m ssm_train verify-resume.",
        "ssm-train verify-resume --cfg cfg/quickstart/gla_lora.yaml --steps 12",
    )
    verify_.add_argument(
        "--cfg", type=Path, required=True, metavar="FILE", help="run config (.yaml or .json)"
    )
    verify_.add_argument(
        "--steps",
        type=commands.positive,
        default=6,
        metavar="N",
        help="optimizer steps, rounded up to a multiple of 3 (default: 6)",
    )

    rerun_ = add(
        "rerun",
        commands.rerun,
        "Repeat a run from its record. Says what differs (versions, hardware, data), trains in a\n"
        "new directory, and compares the first losses with those recorded; exits 1 where they\n"
        "differ.",
        "ssm-train rerun output/quickstart/quickstart_seed42/gla_lora",
    )
    rerun_.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run")
    rerun_.add_argument("--out", type=Path, help="new directory (default: RUN_DIR-rerun)")
    rerun_.add_argument(
        "--losses",
        type=commands.positive,
        default=20,
        metavar="N",
        help="how many losses of the log are compared (default: 20)",
    )
    rerun_.add_argument(
        "--whole",
        action="store_true",
        help="train to the end; else the run saves and stops once these losses are there",
    )

    add_slurm_arguments(
        add(
            "slurm",
            commands.slurm,
            "Write a job script for a Slurm cluster. The job saves itself before its time limit,\n"
            "starts again, and goes on. On a terminal, what is missing is asked for.",
            "ssm-train slurm --cfg cfg/sst2/gla_lora.yaml --nodes 2 --gpus-per-node 8 "
            "--time 24:00:00 --engine zero2",
        )
    )

    doctor_ = add(
        "doctor",
        commands.doctor,
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
    for name, what in commands.SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=what)
    for name, what in commands.VALUES.items():
        parser.add_argument(f"--{name}", metavar=name.upper(), help=what)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any other key of the config; HP_* variables win over both",
    )


def add_slurm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg", type=Path, metavar="FILE", help="run config (.yaml or .json)")
    parser.add_argument("--nodes", type=commands.positive, metavar="N", help="nodes of the job")
    parser.add_argument(
        "--gpus-per-node", type=commands.positive, metavar="N", help="GPUs, and processes"
    )
    parser.add_argument(
        "--time",
        type=commands.time_limit,
        metavar="HH:MM:SS",
        help="limit of one start; also D-HH:MM:SS",
    )
    parser.add_argument(
        "--engine",
        help="single, ddp, zero1, zero2, zero3, fsdp2, ..., or the path "
        "of an Accelerate config (default: single for one GPU, else ddp)",
    )
    parser.add_argument(
        "--cpus-per-gpu", type=commands.positive, default=8, metavar="N", help="cores (default: 8)"
    )
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


def amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value
