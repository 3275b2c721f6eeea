"""The short depthwise causal convolution: the public op, and which implementation runs it."""

from __future__ import annotations

from ssm_train.kernels.causal_conv1d.reference import causal_conv1d

__all__ = ["causal_conv1d", "implementation"]


def implementation() -> str:
    """Name of the implementation in use; "reference" is plain PyTorch."""
    return "reference"
