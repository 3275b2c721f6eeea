"""Mamba-2's state space dual: the public op, and which implementation runs it."""

from __future__ import annotations

from ssm_train.kernels.ssd.reference import ssd

__all__ = ["implementation", "ssd"]


def implementation() -> str:
    """Name of the implementation in use; "reference" is plain PyTorch."""
    return "reference"
