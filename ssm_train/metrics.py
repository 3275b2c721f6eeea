"""What is measured and where it goes: tokens/s, memory, metrics.jsonl, trackers, progress bar."""

from __future__ import annotations

from pydantic import Field

from ssm_train.settings import Settings


class MetricsSettings(Settings):
    """Where metrics go besides `metrics.jsonl` and the terminal."""

    trackers: list[str] = Field(default_factory=list)
    """Of tensorboard, wandb, trackio, swanlab."""


TRACKERS = ("tensorboard", "wandb", "trackio", "swanlab")
"""Trackers that `trackers:` may name; each is a package of the same name."""
