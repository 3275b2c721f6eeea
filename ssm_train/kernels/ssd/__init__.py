"""Mamba-2's state space dual: the public op, in plain PyTorch."""

from ssm_train.kernels.ssd.reference import ssd

__all__ = ["ssd"]
