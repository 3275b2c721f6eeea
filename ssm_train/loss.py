"""The loss: cross entropy summed over supervised tokens. Who divides by what is for the loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # target of a position that does not count
LOGITS_AT_ONCE = 2**25  # 128 MiB in fp32


def sum_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats, summed: logits [S, V], targets [S] int64 -> [] fp32; S = 0 gives 0."""
    return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORED)


def sum_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor, dtype: torch.dtype
) -> Tensor:
    """`sum_cross_entropy` of hidden[positions] @ weight^T, without ever holding all logits.

    hidden [T, H]; weight [V, H], without a gradient where it is frozen; positions and targets [S],
    where a target of -100 does not count. Products are in `dtype`, bf16 or more, logits in fp32.
    """
    loss: Tensor = LinearCrossEntropy.apply(hidden, weight, positions, targets, dtype)
    return loss


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are found with the loss, some rows at a time: the logits are there only then."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden: Tensor, weight: Tensor, positions: Tensor, targets: Tensor, dtype
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        x, W = hidden[positions].to(dtype), weight.to(dtype)
        dx = torch.empty_like(x) if needs_hidden else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        size = max(1, LOGITS_AT_ONCE // len(weight))
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            logits = (x[rows] @ W.mT).float()
            counts = targets[rows] != IGNORED
            target = targets[rows].clamp_min(0)[:, None]
            normaliser = logits.logsumexp(-1, keepdim=True)
            loss += torch.where(counts, (normaliser - logits.gather(1, target))[:, 0], 0).sum()
            if not (needs_hidden or needs_weight):
                continue
            gradient = logits.sub_(normaliser).exp_()  # softmax minus the target's one
            gradient.scatter_add_(1, target, -torch.ones_like(normaliser))
            gradient = (gradient * counts[:, None]).to(dtype)
            if dx is not None:
                torch.mm(gradient, W, out=dx[rows])
            if dW is not None:
                dW += gradient.mT @ x[rows]
        ctx.save_for_backward(positions, dx, dW)
        ctx.hidden, ctx.weight_dtype = (hidden.shape, hidden.dtype), weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[no-untyped-def]
        positions, dx, dW = ctx.saved_tensors
        shape, dtype = ctx.hidden
        dhidden = None
        if dx is not None:
            dhidden = torch.zeros(shape, dtype=dtype, device=dx.device)
            dhidden.index_add_(0, positions, (dx * gradient).to(dtype))
        dweight = None if dW is None else (dW * gradient).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None
