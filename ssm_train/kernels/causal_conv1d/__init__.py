"""The short depthwise causal convolution: the public op, in plain PyTorch."""

from ssm_train.kernels.causal_conv1d.reference import causal_conv1d

__all__ = ["causal_conv1d"]
