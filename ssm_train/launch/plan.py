"""What one call of `gla_round_new.sh` will do, decided from its words and variables before
anything starts: rounds, slots, data, seed, interpreter, places."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_train.errors import InputError, whole_number
from ssm_train.launch.slots import Slots, plan_slots
from ssm_train.launch.suites import (
    check_configs_exist,
    cut_rounds,
    drop_repeated,
    parse_request,
    read_suites,
    select_configs,
    select_rounds,
)

EXP_ROOT = "cfg/my_lora_exp"
DATA = "glue-tvt_cola"
FORCE_SEED = "87"
STOP_GRACE = "60"


@dataclass(frozen=True)
class Plan:
    """Everything that the rounds need to know."""

    suite: str
    rounds: dict[int, tuple[str, ...]]
    """The rounds asked for, in order: number -> file names of its configs."""
    repeated: tuple[str, ...]
    """Configs that stood more than once in the list."""
    slots: Slots
    cfg_dir: str
    peft_dir: str
    data: str
    """Put into every config; empty: each keeps its own."""
    seed: int
    python: str
    log_dir: Path
    skip_done: bool
    stop_grace: float
    """Seconds that an interrupted job has to save itself."""


def plan_suite(words: Sequence[str], environment: Mapping[str, str]) -> Plan:
    """Reads a command line and its variables. Raises InputError; starts and writes nothing."""
    request = parse_request(words)
    root = environment.get("EXP_ROOT") or EXP_ROOT
    cfg_dir = environment.get("CFG_DIR") or f"{root}/yaml"
    source = Path(root) / "suites.yaml"
    slots = plan_slots(environment)
    configs, repeated = drop_repeated(select_configs(read_suites(source), request.suite, source))
    cut = cut_rounds(configs, len(slots.devices))
    rounds = {number: cut[number - 1] for number in select_rounds(request.rounds, len(cut))}
    check_configs_exist([name for names in rounds.values() for name in names], cfg_dir)
    data = choose_data(environment)
    seed = parse_seed(environment.get("FORCE_SEED") or FORCE_SEED, "FORCE_SEED")
    logs = f"logs/{request.suite}_{short_name(data) or 'own'}_s{seed}"
    return Plan(
        suite=request.suite,
        rounds=rounds,
        repeated=tuple(repeated),
        slots=slots,
        cfg_dir=cfg_dir,
        peft_dir=environment.get("PEFT_DIR") or f"{root}/peft",
        data=data,
        seed=seed,
        python=find_python(environment),
        log_dir=Path(environment.get("LOG_DIR") or logs),
        skip_done=request.skip_done,
        stop_grace=parse_seconds(environment.get("STOP_GRACE") or STOP_GRACE),
    )


def choose_data(environment: Mapping[str, str]) -> str:
    """DATA, or HP_DATA, which wins inside every job. Raises InputError where both disagree."""
    data = environment.get("DATA", DATA).strip()
    override = environment.get("HP_DATA", "").strip()
    if override and "DATA" in environment and override != data:
        raise InputError(
            f"HP_DATA={override} would win over DATA={data} in every job; unset one of them"
        )
    return override or data


def parse_seed(text: str, name: str) -> int:
    seed = whole_number(text)
    if seed is None:
        raise InputError(f"{name}: {text!r} is not a seed; give a whole number of at least 0")
    return seed


def parse_seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise InputError(f"STOP_GRACE: {text!r} is not a number of seconds")
    return float(text)


def find_python(environment: Mapping[str, str]) -> str:
    """The interpreter of the jobs: PYTHON, else the repository's, else this one."""
    if asked := environment.get("PYTHON"):
        if shutil.which(asked) is None:
            raise InputError(f"PYTHON: {asked!r} is not a program; give the path of an interpreter")
        return asked
    ours = Path(".venv/bin/python")
    return str(ours) if ours.is_file() else sys.executable


def short_name(data: str) -> str:
    """The data's name as a part of a file name: of a path, its stem."""
    return re.sub(r"[^\w-]+", "_", Path(data).stem)
