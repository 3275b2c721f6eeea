"""Causal depthwise convolution in plain PyTorch: the oracle, and what runs on CPU.

Every document is laid behind its own window, so that one sweep over all of them cannot leak.
"""

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
    """y_t = activation(bias + sum_j weight[:, j] x_{t - W + 1 + j}), channel by channel.

    Args:
        x: [B, T, d]. weight: [d, W]; its last column meets the newest input. bias: [d].
        activation: None or "silu".
        initial_window: the W - 1 inputs before the first, oldest first, [N, d, W - 1], or
            [1, d, W - 1] for all; zeros if None. N is B, or the number of documents.
        output_final_window: also return the last W - 1 inputs, those of the initial window
            included where there are fewer.
        cu_seqlens: [N + 1] offsets of documents packed into one row (B = 1); each starts from
            the initial window and sees nothing of the others.

    Returns:
        y [B, T, d] in x's dtype, and the final windows [N, d, W - 1] in x's dtype, or None. Sums
        are fp32 (fp64 for fp64 inputs).
    """
    assert activation in (None, "silu"), activation
    rows, length, channels = x.shape
    before = weight.shape[1] - 1
    lengths = [length] if cu_seqlens is None else cu_seqlens.diff().tolist()
    assert sum(lengths) == length and (cu_seqlens is None or rows == 1), (x.shape, lengths)

    dtype = torch.promote_types(x.dtype, torch.float32)
    if initial_window is None:
        initial_window = x.new_zeros(1, channels, before)
    windows = initial_window.to(dtype).mT.expand(len(lengths) * rows, -1, -1)
    windows = windows.reshape(len(lengths), rows, before, channels)
    documents = [
        torch.cat([window, document], 1)  # [B, W - 1 + tokens, d]
        for window, document in zip(windows, x.to(dtype).split(lengths, 1), strict=True)
    ]
    laid = torch.cat(documents, 1)

    taps = weight.to(dtype).unbind(1)
    covered = laid.shape[1] - before
    y = laid[:, before:] * taps[-1]
    if bias is not None:
        y = y + bias.to(dtype)
    for j, tap in enumerate(taps[:-1]):
        y = torch.addcmul(y, laid[:, j : j + covered], tap)
    # What was computed at the windows between two documents belongs to none.
    pieces = y.split([part for n in lengths for part in (n, before)][:-1], 1)
    y = torch.cat(pieces[::2], 1)
    if activation == "silu":
        y = F.silu(y)
    if not output_final_window:
        return y.to(x.dtype), None
    finals = torch.stack([document[:, document.shape[1] - before :] for document in documents])
    return y.to(x.dtype), finals.flatten(0, 1).mT.to(x.dtype)
