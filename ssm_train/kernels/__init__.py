"""Operations of the mixers: each in plain PyTorch, the oracle, and some in Triton."""

from __future__ import annotations

import torch


def implementation(kernels: str, device: str | torch.device) -> str:
    """What runs tensors on `device`, for ops that have both: "triton" on a GPU unless `kernels` is
    "reference", which is plain PyTorch."""
    on_gpu = torch.device(device).type == "cuda"
    return "triton" if on_gpu and kernels != "reference" else "reference"
