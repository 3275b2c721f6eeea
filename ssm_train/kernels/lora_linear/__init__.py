"""Linear layers with LoRA that read one input: the public op. In PyTorch, on every device."""

from ssm_train.kernels.lora_linear.fused import constant_factors, lora_linears, row_norms
from ssm_train.kernels.lora_linear.reference import LoraLinear

__all__ = ["LoraLinear", "constant_factors", "lora_linears", "row_norms"]
