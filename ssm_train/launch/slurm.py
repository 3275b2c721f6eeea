"""Job scripts for Slurm, written from flags: their `#SBATCH` lines, and the Accelerate config that
fits the numbers of nodes and GPUs. What a job then does is `slurm_job.sh`, as for slurm/*.sh."""

from __future__ import annotations

import re
import shlex
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssm_train.errors import InputError, near

BODY = Path(__file__).with_name("slurm_job.sh")
ENGINES = Path("accelerate_configs")
ENVIRONMENT = Path("slurm/env.sh")
SIGNAL_SECONDS = 180
"""Before the limit, for a step and a checkpoint; Slurm may send the signal a minute earlier."""
TIME = re.compile(r"(?:([0-9]{1,6})-)?([0-9]{1,6}):([0-5]\d):([0-5]\d)")
WORD = re.compile(r"[\w.,:@%+=/\[\]-]+")


@dataclass(frozen=True)
class Job:
    """What a job script asks for."""

    cfg: Path
    nodes: int
    gpus_per_node: int
    time: str
    """HH:MM:SS or D-HH:MM:SS."""
    accelerate_config: Path
    cpus_per_gpu: int = 8
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    more: tuple[str, ...] = ()
    """Further options of sbatch, such as --mem=200G."""


def write_job(job: Job, out: Path) -> None:
    """The script as a new file. Raises InputError."""
    text = describe_job(job, Path.cwd())
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
        mode = out.stat().st_mode  # as the umask has it
        out.chmod(mode | (mode & 0o444) >> 2)  # whoever may read it may run it
    except FileExistsError:
        raise InputError(f"--out {out} exists already; remove it or give another name") from None
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None


def describe_job(job: Job, directory: Path) -> str:
    """The script's text; it runs in `directory`, from which its paths start."""
    sourced = [ENVIRONMENT] if (directory / ENVIRONMENT).is_file() else []
    lines = [
        "#!/usr/bin/env bash",
        "# Made by `ssm-train slurm`. Submit it with sbatch; key=value words after its name change",
        "# the run. Submitted again, it goes on from the newest valid checkpoint.",
        *(f"#SBATCH {option}" for option in sbatch_options(job)),
        "set -euo pipefail",
        f"cd {shlex.quote(str(directory))}",
        f"export PYTHON={shlex.quote(sys.executable)}",
        *(
            f"# shellcheck source=/dev/null\nsource {shlex.quote(str(file))}"
            for file in (*sourced, BODY)
        ),
        f"train_on_nodes {shlex.quote(str(job.accelerate_config))} {shlex.quote(str(job.cfg))} "
        '"$@"',
    ]
    return "".join(f"{line}\n" for line in lines)


def sbatch_options(job: Job) -> list[str]:
    """Raises InputError for a value that would not stay one word of its line."""
    name = re.sub(r"[^\w.-]", "_", job.cfg.stem)
    chosen = {"partition": job.partition, "account": job.account, "qos": job.qos}
    options = [
        f"--job-name={name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={job.gpus_per_node}",
        f"--cpus-per-task={job.cpus_per_gpu * job.gpus_per_node}",
        f"--time={job.time}",
        *(f"--{key}={value}" for key, value in chosen.items() if value is not None),
        f"--signal=B:USR1@{signal_seconds(job.time)}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.out",
        *job.more,
    ]
    for option in options:
        if not option.startswith("--") or not WORD.fullmatch(option):
            raise InputError(f"{option!r} is not one option of sbatch, such as --mem=200G")
    return options


def signal_seconds(time: str) -> int:
    """How long before its limit a job is told to save itself: of a short one, a tenth."""
    return min(SIGNAL_SECONDS, read_time(time) // 10)


def read_time(text: str) -> int:
    """Seconds of HH:MM:SS or D-HH:MM:SS. Raises InputError for others, and below a minute."""
    match = TIME.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r} is not HH:MM:SS, such as 24:00:00, or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total < 60:
        raise InputError(f"{text!r} is less than a minute, Slurm's least")
    return total


def find_accelerate_config(engine: str, prec: str, nodes: int) -> Path:
    """The config of an engine's name for a run's precision, or `engine` itself where that is a
    file. Raises InputError naming the engines there are."""
    directory = ENGINES / ("many_nodes" if nodes > 1 else "one_node")
    is_path = engine.endswith((".yaml", ".yml"))
    path = Path(engine) if is_path else directory / f"{engine}_{prec}.yaml"
    if path.is_file():
        return path
    known = sorted(file.stem.removesuffix(f"_{prec}") for file in directory.glob(f"*_{prec}.yaml"))
    if known and not is_path:
        raise InputError(
            f"--engine {engine!r} is not in {directory} for prec {prec}; there is "
            f"{', '.join(known)}{near(engine, known)}"
        )
    raise InputError(
        f"--engine {engine!r}: {path} does not exist; start in the root of the repository, or give "
        "the path of an Accelerate config (.yaml)"
    )


def ask(question: str, read: Callable[[str], object]) -> object:
    """The answer to a question on the terminal, asked until `read` takes it."""
    while True:
        try:
            return read(input(f"{question}: ").strip())
        except (ValueError, ArgumentTypeError) as error:
            sys.stderr.write(f"{error}\n")
        except EOFError:
            raise InputError(f"{question}: no answer") from None
