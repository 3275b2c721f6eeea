"""Gated linear attention: the public op, in plain PyTorch."""

from ssm_train.kernels.gla.reference import gla

__all__ = ["gla"]
