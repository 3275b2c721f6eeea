"""Mamba's selective scan: the public op, and which implementation runs it."""

from __future__ import annotations

from ssm_train.kernels.selective_scan.reference import selective_scan

__all__ = ["implementation", "selective_scan"]


def implementation() -> str:
    """Name of the implementation in use; "reference" is plain PyTorch."""
    return "reference"
