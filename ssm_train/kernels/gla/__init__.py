"""Gated linear attention: the public op, and which implementation runs it."""

from __future__ import annotations

from ssm_train.kernels.gla.reference import gla

__all__ = ["gla", "implementation"]


def implementation() -> str:
    """Name of the implementation in use; "reference" is plain PyTorch."""
    return "reference"
