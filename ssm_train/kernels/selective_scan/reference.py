"""Selective scan in plain PyTorch: the oracle for other implementations, and what runs on CPU.

Steps through time in blocks that fit the cache; only the state at the start of a block is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 2**18  # of a [steps, B, n, d] block: 1 MiB in fp32, measured best on CPU
Span = tuple[int, int]


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The scan of Mamba (arXiv 2312.00752, algorithm 2), with state in and out.

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
        y_t = (C_t . h_t + D u_t) silu(z_t)

    Args:
        u, dt, z: [B, T, d]. dt >= 0 is the step; 0 passes the state unchanged.
        A: [d, n], negative. B, C: [B, T, n], shared by all channels, or [B, T, d, n]. D: [d].
        initial_state: [N, d, n], or [1, d, n] for all; zeros if None. N is B, or the number of
            documents.
        output_final_state: also return the states after the last token.
        cu_seqlens: [N + 1] offsets of documents packed into one row (B = 1); each starts from
            the initial state and sees nothing of the others.
        dt_softplus: dt is the step before its softplus; -inf passes the state unchanged.

    Returns:
        y [B, T, d] in u's dtype, and the final states [N, d, n] or None. The state is fp32
        (fp64 for fp64 inputs).
    """
    rows, length, channels = u.shape
    spans = [(0, length)]
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        spans = list(zip(offsets[:-1], offsets[1:], strict=True))
        assert rows == 1 and offsets[0] == 0 and offsets[-1] == length, (u.shape, offsets)
    dtype = torch.promote_types(u.dtype, torch.float32)
    if initial_state is None:
        initial_state = A.new_zeros(1, *A.shape)
    # [spans, rows, n, d]: channels last, so that every inner loop is long and contiguous.
    initial = initial_state.to(dtype).mT.expand(len(spans) * rows, -1, -1)
    initial = initial.reshape(len(spans), rows, -1, channels)

    B, C = (v[..., None] if v.ndim == 3 else v.mT.contiguous() for v in (B, C))
    if dt_softplus:
        dt = F.softplus(dt.to(dtype))
    wide = (v.to(dtype).transpose(0, 1) for v in (u, dt, B, C))  # time first
    y, final = _Scan.apply(*wide, A.to(dtype).mT.contiguous(), initial, spans)
    y = y.transpose(0, 1)
    if D is not None:
        y = torch.addcmul(y, u.to(dtype), D.to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), final.flatten(0, 1).mT if output_final_state else None


class _Scan(torch.autograd.Function):
    """(u, dt [T, B, d]; B, C [T, B, n, 1 or d]; A [n, d]; initial [spans, B, n, d]) -> (y, final).

    The backward pass runs the spans' blocks from last to first. It computes the states of a
    block again and lets their adjoints flow back: g_t = C_t gy_t + exp(dt_{t+1} A) g_{t+1}.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor,
        initial: Tensor,
        spans: list[Span],
    ) -> tuple[Tensor, Tensor]:
        y, final = torch.empty_like(u), torch.empty_like(initial)
        buffers = _allocate_block(initial[0], spans, 2)
        block_starts = []
        with torch.autocast(u.device.type, enabled=False):
            for document, span in enumerate(spans):
                state = initial[document]
                for steps in _blocks(span, state.numel()):
                    block_starts.append(state)
                    _, states = _run_block(u[steps], dt[steps], B[steps], A, state, *buffers)
                    y[steps] = _sum_states(C[steps], states[1:])
                    state = states[-1].clone()
                final[document] = state
        ctx.save_for_backward(u, dt, B, C, A, *block_starts)
        ctx.spans = spans
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, B, C, A, *block_starts = ctx.saved_tensors
        grad_u, grad_dt, grad_B, grad_C = (torch.empty_like(v) for v in (u, dt, B, C))
        grad_A, grad_initial = torch.zeros_like(A), torch.empty_like(grad_final)
        *buffers, adjoint_buffer, product_buffer = _allocate_block(grad_final[0], ctx.spans, 4)
        with torch.autocast(u.device.type, enabled=False):
            for document in reversed(range(len(ctx.spans))):
                carry = grad_final[document]  # [B, n, d], of the state at the block's end
                for steps in reversed(list(_blocks(ctx.spans[document], carry.numel()))):
                    u_s, dt_s, grad_y_s = (v[steps, :, None] for v in (u, dt, grad_y))
                    decay, states = _run_block(
                        u[steps], dt[steps], B[steps], A, block_starts.pop(), *buffers
                    )
                    adjoint, product = (v[: len(decay)] for v in (adjoint_buffer, product_buffer))
                    torch.mul(C[steps], grad_y_s, out=adjoint)
                    adjoint[-1] += carry
                    backwards = list(zip(adjoint.unbind(), decay.unbind(), strict=True))[::-1]
                    for (later, decay_t), (earlier, _) in pairwise(backwards):
                        earlier.addcmul_(decay_t, later)
                    carry = decay[0] * adjoint[0]

                    torch.mul(states[1:], grad_y_s, out=product)
                    grad_C[steps] = product.sum_to_size(C[steps].shape)
                    torch.mul(adjoint, dt_s * u_s, out=product)
                    grad_B[steps] = product.sum_to_size(B[steps].shape)
                    through_input = _sum_states(B[steps], adjoint)
                    grad_u[steps] = dt[steps] * through_input
                    # With respect to the exponent dt_t A, in place of the adjoint.
                    exponent = adjoint.mul_(decay).mul_(states[:-1])
                    through_decay = torch.mul(exponent, A, out=product).sum(2)
                    grad_dt[steps] = through_decay.addcmul_(u[steps], through_input)
                    if ctx.needs_input_grad[4]:
                        grad_A += exponent.mul_(dt_s).sum((0, 1))
                grad_initial[document] = carry
        return grad_u, grad_dt, grad_B, grad_C, grad_A, grad_initial, None


def _steps_per_block(state_elements: int) -> int:
    return max(1, BLOCK_ELEMENTS // state_elements)


def _blocks(span: Span, state_elements: int) -> Iterator[slice]:
    start, end = span
    steps = _steps_per_block(state_elements)
    for first in range(start, end, steps):
        yield slice(first, min(first + steps, end))


def _allocate_block(state: Tensor, spans: list[Span], count: int) -> list[Tensor]:
    """Buffers [steps + 1, B, n, d] for all blocks: fresh memory would cost more than the maths."""
    longest = max(end - start for start, end in spans)
    steps = min(longest, _steps_per_block(state.numel()))
    return [state.new_empty(steps + 1, *state.shape) for _ in range(count)]


def _sum_states(weights: Tensor, states: Tensor) -> Tensor:
    """[S, B, n, 1 or d] and [S, B, n, d] -> [S, B, d]: the sum over n of their product."""
    if weights.shape[-1] == 1:  # one matrix product, several times faster
        return (weights.mT @ states).squeeze(2)
    return (weights * states).sum(2)


def _run_block(
    u: Tensor, dt: Tensor, B: Tensor, A: Tensor, state: Tensor, decay: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills decay with exp(dt A), [S, B, n, d], and states [S + 1, B, n, d] from `state` on."""
    decay, states = decay[: len(u)], states[: len(u) + 1]
    torch.mul(dt[:, :, None], A, out=decay).exp_()
    states[0] = state
    torch.mul(B, (dt * u)[:, :, None], out=states[1:])
    for decay_t, (earlier, later) in zip(decay.unbind(), pairwise(states.unbind()), strict=True):
        later.addcmul_(decay_t, earlier)
    return decay, states
