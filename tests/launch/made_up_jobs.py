"""Suites of made-up jobs: the launcher is real, `train.py` is a few lines of bash per config."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "train" / "new"

OURS = ("HP_", "GPU_", "CUDA_VISIBLE_", "TMUX", "CFG_DIR", "PEFT_DIR", "FORCE_SEED", "DATA")
# Anything but train.py is for the real interpreter: the scripts start the launcher with PYTHON too.
PROGRAM = """\
#!/usr/bin/env bash
[[ $1 == train.py ]] || exec {python} "$@"
room={room}
name=$(basename "$3" .yaml)
echo "$name" >>"$room/order"
printf '%s\\n' "$@" >"$room/$name.arguments"
env >"$room/$name.environment"
cp "$3" "$room/$name.seen.yaml"
echo "this is $name"
if [[ -f $room/$name.sh ]]; then source "$room/$name.sh"; fi
"""


@dataclass(frozen=True)
class Room:
    """A directory with suites, configs and what their jobs do and saw."""

    path: Path

    def write(self, suites: Mapping[str, Sequence[str]], **jobs: str) -> None:
        """Suites of config names, a config for each, and bash for some jobs (default: exit 0)."""
        (self.path / "yaml").mkdir(exist_ok=True)
        (self.path / "suites.yaml").write_text(
            yaml.safe_dump({suite: list(names) for suite, names in suites.items()}),
            encoding="utf-8",
        )
        for name in {name for names in suites.values() for name in names}:
            file = self.path / "yaml" / f"{name.removesuffix('.yaml')}.yaml"
            file.write_text(f"# about {name}\nmodel: none\ndata: own_{file.stem}\n")
        for name, script in jobs.items():
            (self.path / f"{name}.sh").write_text(script, encoding="utf-8")

    def environment(self, **variables: str) -> dict[str, str]:
        """Ours without what would steer a suite; two slots on the CPU."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
        return {
            **kept,
            "CUDA_VISIBLE_DEVICES": "",
            "GPU_PLAN": "2",
            "EXP_ROOT": str(self.path),
            "LOG_DIR": str(self.path / "logs"),
            "PYTHON": str(self.path / "python"),
            "TMPDIR": str(self.path / "tmp"),
            **variables,
        }

    def script(self, name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs one of the scripts, from another directory than the repository's."""
        return subprocess.run(
            ["bash", str(SCRIPTS / name), *words],
            env=self.environment(**variables),
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    @contextmanager
    def started(self, *words: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
        """A suite under way; ended, if it still runs, when the test is over."""
        suite = subprocess.Popen(
            ["bash", str(SCRIPTS / "gla_round_new.sh"), *words],
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            text=True,
        )
        with suite:
            try:
                yield suite
            finally:
                suite.terminate()

    def order(self) -> list[str]:
        """Names of the jobs that started."""
        file = self.path / "order"
        return file.read_text().split() if file.exists() else []

    def seen(self, name: str) -> dict[str, Any]:
        """The config that a job was given."""
        return yaml.safe_load((self.path / f"{name}.seen.yaml").read_text())

    def arguments(self, name: str) -> list[str]:
        return (self.path / f"{name}.arguments").read_text().splitlines()

    def variables(self, name: str) -> dict[str, str]:
        lines = (self.path / f"{name}.environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


def make_room(path: Path) -> Room:
    """An empty room with its program."""
    (path / "tmp").mkdir()
    program = path / "python"
    program.write_text(
        PROGRAM.format(python=shlex.quote(sys.executable), room=shlex.quote(str(path)))
    )
    program.chmod(0o755)
    return Room(path)


def wait_until(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def processes_with(text: str) -> list[str]:
    """Living processes that have `text` in their command line."""
    command = ["ps", "-eww", "-o", "pid=,stat=,args="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return [
        line
        for line in listed.stdout.splitlines()
        if text in line and not line.split()[1].startswith("Z")
    ]
