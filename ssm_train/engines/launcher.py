"""What `accelerate launch` was asked for, read from the process that started this one: its
environment variables alone do not say how many processes there should have been."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssm_train.errors import InputError


@dataclass(frozen=True)
class Statement:
    """What its flags say, else its config file; None: neither does."""

    config_file: str | None = None
    num_processes: int | None = None
    mixed_precision: str | None = None
    distributed_type: str | None = None

    @property
    def source(self) -> str:
        return self.config_file or "accelerate launch"


def read_parent() -> Statement:
    """Of the parent process, on Linux; nothing where that is no `accelerate launch`."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")[:-1]
    except (OSError, UnicodeDecodeError):
        return Statement()
    return read_command(words)


def read_command(words: list[str]) -> Statement:
    """Of a command line. Raises InputError for a config file that cannot be read."""
    arguments = launch_arguments(words)
    if arguments is None:
        return Statement()
    from accelerate.commands.launch import launch_command_parser

    flags, _ = launch_command_parser().parse_known_args(arguments)
    said: dict[str, Any] = {}
    if flags.config_file:
        try:
            said = yaml.safe_load(Path(flags.config_file).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"Accelerate config {flags.config_file}: {error}") from error
        if not isinstance(said, dict):
            raise InputError(f"Accelerate config {flags.config_file}: it holds no keys and values")
    if flags.use_deepspeed:
        said["distributed_type"] = "DEEPSPEED"
    elif flags.use_fsdp:
        said["distributed_type"] = "FSDP"
    return Statement(
        flags.config_file,
        flags.num_processes or said.get("num_processes"),
        flags.mixed_precision or as_text(said.get("mixed_precision")),
        said.get("distributed_type"),
    )


def launch_arguments(words: list[str]) -> list[str] | None:
    """What comes after `accelerate launch` in all the ways to write it."""
    for place, word in enumerate(words):
        name = Path(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return words[place + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli"):
            return words[place + 2 :] if words[place + 1 : place + 2] == ["launch"] else None
        if name == "launch.py" and "accelerate" in Path(word).parts:
            return words[place + 1 :]
    return None


def as_text(value: Any) -> str | None:
    """YAML reads a plain no as False."""
    return "no" if value is False else value
