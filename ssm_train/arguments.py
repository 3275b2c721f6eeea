"""Which commands there are, and what each takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ssm_train import __version__, argument_types, commands
from ssm_train.errors import InputError

EPILOG = """exit codes:
  0 done   1 failed   2 bad input   75 saved and wants to be started again   130 interrupted
"""


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


Add = Callable[[str, object, str, str], argparse.ArgumentParser]
"""Of a command: its name, what runs it, its description, an example."""


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

    for add_command in (
        add_train,
        add_eval,
        add_generate,
        add_merge,
        add_plot,
        add_report,
        add_plan,
        add_warmup,
        add_verify_resume,
        add_rerun,
        add_slurm,
        add_doctor,
    ):
        add_command(add)
    return parser


def add_train(add: Add) -> None:
    command = add(
        "train",
        commands.train,
        "Train a run config. Writes checkpoints, metrics, a plot and the adapter\n"
        "to <output_root>/<data>_seed<seed>/<config name>.",
        "ssm-train train --cfg cfg/quickstart/gla_lora.yaml learning_rate=1e-3 seed=7",
    )
    add_cfg(command)
    for name, what in commands.SWITCHES.items():
        command.add_argument(f"--{name}", action="store_true", help=what)
    for name, what in commands.VALUES.items():
        command.add_argument(f"--{name}", metavar=name.upper(), help=what)
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="any other key of the config; HP_* variables win over both",
    )


def add_eval(add: Add) -> None:
    command = add(
        "eval",
        commands.evaluate,
        "Evaluate a run. Prints the loss and the task's metrics.",
        "ssm-train eval output/quickstart/quickstart_seed42/gla_lora --split test",
    )
    add_run_arguments(command)
    command.add_argument("--data", help="other data than the run's (name or path)")
    command.add_argument("--split", help="train, val or test (default: the run's)")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def add_generate(add: Add) -> None:
    command = add(
        "generate",
        commands.generate,
        "Generate with a run's model. Prints one continuation per prompt.",
        "ssm-train generate output/quickstart/quickstart_seed42/gla_lora --prompt "
        '"port : gdansk | kind : clipper | cargo : wine | ship : kestrel | colour : blue =>"',
    )
    add_run_arguments(command)
    command.add_argument("--prompt", action="append", default=[], help="repeat for several")
    command.add_argument("--file", type=Path, help="a text file with one prompt a line")
    add_count(command, "--max-new-tokens", "default: 128", 128)
    add_count(command, "--num-beams", "default: 1, greedy", 1)


def add_merge(add: Add) -> None:
    command = add(
        "merge",
        commands.merge,
        "Merge a run's adapter. Writes full weights that any transformers install loads, or\n"
        "mamba_ssm, once it is shown that they compute the same.",
        "ssm-train merge output/quickstart/quickstart_seed42/mamba_lora --out merged/",
    )
    add_run_arguments(command, device="cpu")  # kernels of a GPU multiply fp32 in TF32
    command.add_argument("--out", type=Path, required=True, help="directory for the weights")
    command.add_argument(
        "--format",
        choices=("transformers", "mamba_ssm"),
        default="transformers",
        help="transformers (default), or mamba_ssm's own, for Mamba-1 and Mamba-2",
    )
    command.add_argument(
        "--tolerance",
        type=argument_types.share,
        default=1e-5,
        metavar="X",
        help="largest change of the logits, relative to their size (default: 1e-5)",
    )


def add_plot(add: Add) -> None:
    command = add(
        "plot",
        commands.plot,
        "Plot losses and metrics of runs. Draws all runs into one PNG.",
        "ssm-train plot output/quickstart/quickstart_seed42/* --out compare.png",
    )
    command.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    command.add_argument(
        "--out", type=Path, help="PNG file (default: metrics.png in the first RUN_DIR)"
    )


def add_report(add: Add) -> None:
    command = add(
        "report",
        commands.report,
        "Compare runs in one table. Prints a row a run, the best first, and writes the table as\n"
        "text and CSV, and a PNG of the main metrics.",
        "ssm-train report output/quickstart --out compare",
    )
    command.add_argument(
        "directories", nargs="+", type=Path, metavar="DIR", help="a run, or a directory above runs"
    )
    command.add_argument(
        "--out", type=Path, help="files without their ends (default: report in the first DIR)"
    )


def add_plan(add: Add) -> None:
    command = add(
        "plan",
        commands.plan,
        "Count the GPU memory of a run before it starts. Lists weights, optimizer, activations,\n"
        "logits, and the largest batch that fits; with --gpus also what each engine holds on each\n"
        "of them and sends between them. Needs no GPU, no weights (of a model only its\n"
        "config.json) and no data.",
        "ssm-train plan --cfg cfg/warmup/gla_1.3b_packed.yaml --gib 79.2 --gpus 64 --net 50",
    )
    add_cfg(command)
    command.add_argument(
        "--gib",
        type=argument_types.amount,
        help="memory of the GPU (default: that of the one here, else 79.2)",
    )
    add_count(command, "--gpus", "GPUs that train together")
    command.add_argument(
        "--net",
        type=argument_types.amount,
        metavar="GB/s",
        help="what each GPU can send to the others",
    )
    command.add_argument(
        "--step-seconds",
        type=argument_types.amount,
        metavar="S",
        help="seconds of an optimizer step on one GPU, to compare with",
    )


def add_warmup(add: Add) -> None:
    command = add(
        "warmup",
        commands.warmup,
        "Tune the kernels for this GPU. Writes the fastest configurations for the shapes of a run\n"
        "to the user's cache directory, where every later run finds them.",
        "ssm-train warmup --cfg cfg/warmup/gla_1.3b_packed.yaml",
    )
    add_cfg(command)
    add_count(command, "--processes", "processes that compile (default: cores - 2, up to 16)")
    command.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write instead")


def add_verify_resume(add: Add) -> None:
    command = add(
        "verify-resume",
        commands.verify_resume,
        "Prove that stopping changes nothing. Trains some steps of a run in one go, and again\n"
        "killed twice and resumed, in a temporary directory, and compares bit for bit; exits 1\n"
        "where anything differs, and says what comes first. Under several processes: started by\n"
        "their launcher, with -m ssm_train verify-resume.",
        "ssm-train verify-resume --cfg cfg/quickstart/gla_lora.yaml --steps 12",
    )
    add_cfg(command)
    add_count(command, "--steps", "optimizer steps, rounded up to a multiple of 3 (default: 6)", 6)


def add_rerun(add: Add) -> None:
    command = add(
        "rerun",
        commands.rerun,
        "Repeat a run from its record. Says what differs (versions, hardware, data), trains in a\n"
        "new directory, and compares the first losses with those recorded; exits 1 where they\n"
        "differ.",
        "ssm-train rerun output/quickstart/quickstart_seed42/gla_lora",
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run")
    command.add_argument("--out", type=Path, help="new directory (default: RUN_DIR-rerun)")
    add_count(command, "--losses", "how many losses of the log are compared (default: 20)", 20)
    command.add_argument(
        "--whole",
        action="store_true",
        help="train to the end; else the run saves and stops once these losses are there",
    )


def add_slurm(add: Add) -> None:
    command = add(
        "slurm",
        commands.slurm,
        "Write a job script for a Slurm cluster. The job saves itself before its time limit,\n"
        "starts again, and goes on. On a terminal, what is missing is asked for.",
        "ssm-train slurm --cfg cfg/sst2/gla_lora.yaml --nodes 2 --gpus-per-node 8 "
        "--time 24:00:00 --engine zero2",
    )
    command.add_argument("--cfg", type=Path, metavar="FILE", help="run config (.yaml or .json)")
    add_count(command, "--nodes", "nodes of the job")
    add_count(command, "--gpus-per-node", "GPUs, and processes")
    command.add_argument(
        "--time",
        type=argument_types.time_limit,
        metavar="HH:MM:SS",
        help="limit of one start; also D-HH:MM:SS",
    )
    command.add_argument(
        "--engine",
        help="single, ddp, zero1, zero2, zero3, fsdp2, ..., or the path "
        "of an Accelerate config (default: single for one GPU, else ddp)",
    )
    add_count(command, "--cpus-per-gpu", "cores (default: 8)", 8)
    for name in ("partition", "account", "qos"):
        command.add_argument(f"--{name}", help="default: the cluster's")
    command.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option, as --sbatch=--mem=200G; repeat for several",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="default: <config name>.sh")


def add_doctor(add: Add) -> None:
    command = add(
        "doctor",
        commands.doctor,
        "Show what this machine can run. Lists versions, devices, the kernel that each operation\n"
        "will use, why not a faster one, and what to install.",
        "ssm-train doctor --json",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")


def add_cfg(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cfg", type=Path, required=True, metavar="FILE", help="run config (.yaml or .json)"
    )


def add_run_arguments(parser: argparse.ArgumentParser, device: str = "auto") -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run")
    parser.add_argument(
        "--checkpoint", default="best", metavar="STEP", help="best (default), last or a step"
    )
    parser.add_argument(
        "--device", default=device, help=f"auto, cpu, cuda or cuda:1 (default: {device})"
    )


def add_count(
    command: argparse.ArgumentParser, flag: str, what: str, default: int | None = None
) -> None:
    command.add_argument(
        flag, type=argument_types.positive, default=default, metavar="N", help=what
    )
