"""Checkpoints that survive a kill at any point, and adapters for people."""

from __future__ import annotations

from pydantic import Field

from ssm_train.settings import Settings


class CheckpointSettings(Settings):
    """How many checkpoints to keep."""

    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept besides the best one."""
