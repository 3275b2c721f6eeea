"""Causal depthwise convolution in plain PyTorch: the oracle, and what runs on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_window: Tensor | None = None,
    output_final_window: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = activation(bias + sum_j weight[:, j] x_{t-W+1+j}), inside each document.

    x [B, T, d]; weight [d, W]; bias [d]; initial_window [N or 1, d, W-1]; returns y [B, T, d] in
    x's dtype and, if asked, the last W-1 inputs of each document, [N, d, W-1].
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    if cu_seqlens is None:
        pieces = list(x.unbind(0))
    else:
        pieces = list(x[0].split(cu_seqlens.diff().tolist()))
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if initial_window is None:
        initial_window = x.new_zeros(1, channels, width - 1)
    windows = initial_window.to(dtype).expand(len(pieces), -1, -1)
    outputs, tails = [], []
    for piece, window in zip(pieces, windows, strict=True):
        padded = torch.cat([window, piece.to(dtype).mT], dim=1)  # [d, W - 1 + T]
        taps = [padded[:, j : j + len(piece)] * weight[:, j : j + 1] for j in range(width)]
        outputs.append(torch.stack(taps).sum(0).mT)
        tails.append(padded[:, padded.shape[1] - width + 1 :])
    y = torch.cat(outputs).view(x.shape)
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), torch.stack(tails) if output_final_window else None
