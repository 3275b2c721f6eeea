"""Gated linear attention in plain PyTorch: the oracle for other implementations, and what runs
on CPU. Chunks of matrix products; a chunk whose gates are strong is bisected until they are mild.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Time per token with chunks of so many tokens, measured on CPU with K = 64, V = 128.
CHUNK_COST = {64: 1.0, 32: 1.0, 16: 1.2}
# exp(40) times exp(40) is still finite in fp32, so factors of this size cannot overflow.
MILD = 40.0
# A gate below this closes its channel: exp(-1e4) is 0, and sums of -1e4 stay exact in float64.
CLOSED = -1e4


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention (arXiv 2312.06635, eq. 3), with state in and out.

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Args:
        q, k: [B, T, H, K]. v: [B, T, H, V].
        g: [B, T, H, K], log decay per key channel, <= 0. g = 0 and k = 0 pass the state unchanged.
        scale: K ** -0.5 if None.
        initial_state: [N, H, K, V], or [1, H, K, V] for all; zeros if None. N is B, or the number
            of documents.
        output_final_state: also return the states after the last token.
        cu_seqlens: [N + 1] offsets of documents packed into one row (B = 1); each starts from
            the initial state and sees nothing of the others.

    Returns:
        o [B, T, H, V] in v's dtype, and the final states [N, H, K, V] or None. The arithmetic and
        the state are fp32 (fp64 for fp64 inputs), also under autocast.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    assert k.shape == g.shape == q.shape and T > 0, (q.shape, k.shape, g.shape)
    assert v.shape == (B, T, H, V), (q.shape, v.shape)
    lengths = [T] * B
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        assert B == 1 and offsets[0] == 0 and offsets[-1] == T, (q.shape, offsets)
        lengths = [end - start for start, end in pairwise(offsets)]
        assert min(lengths) >= 0, offsets
    dtype = torch.promote_types(v.dtype, torch.float32)
    if initial_state is None:
        initial_state = v.new_zeros(1, H, K, V, dtype=dtype)
    state = initial_state.to(dtype).expand(len(lengths), H, K, V)

    out_dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
        q = q * (K**-0.5 if scale is None else scale)
        if T == 1 and cu_seqlens is None:
            o, state = _step(q, k, v, g, state)
        else:
            o, state = _run_chunks(q, k, v, g, state, _plan(lengths, H, q.device))
    return o.to(out_dtype), state if output_final_state else None


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each sequence, as in decoding."""
    q, k, v, g = (x.squeeze(1) for x in (q, k, v, g))  # [B, H, K or V]
    state = g.exp()[..., None] * state + k[..., None] * v[..., None, :]
    return (q[..., None, :] @ state).transpose(1, 2), state


def _run_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, layout: _Layout
) -> tuple[Tensor, Tensor]:
    """The chunked form (section 4.2): scores within a chunk, a state from chunk to chunk."""
    shape, dtype = v.shape, v.dtype
    q, k, v, g = (layout.cut(x) for x in (q, k, v, g))  # [M, C, K or V], M = chunks * H
    # float64, because a weak gate after a strong one is a small difference of large sums.
    b = g.clamp(min=CLOSED).double().cumsum(1)
    total = b[:, -1:]
    decay = total.to(dtype).exp().mT  # [M, K, 1]
    written = (k * (total - b).to(dtype).exp()).mT @ v  # [M, K, V]
    states, final = _pass_states(decay, written, initial_state, layout)
    from_before = (q * b.to(dtype).exp()) @ states
    o = torch.baddbmm(from_before, _scores(q, k, b), v)
    return layout.join(o, shape), final


def _pass_states(
    decay: Tensor, written: Tensor, initial_state: Tensor, layout: _Layout
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, [M, K, V], and after each sequence, [N, H, K, V]."""
    H, K, V = initial_state.shape[1:]
    state = initial_state[layout.order].flatten(0, 1)
    before, ended = [], []
    rows = [n * H for n in layout.running]
    for n, decay_n, written_n in zip(rows, decay.split(rows), written.split(rows), strict=True):
        if n < len(state):
            state, done = state.split([n, len(state) - n])
            ended.append(done)
        before.append(state)
        state = torch.addcmul(written_n, decay_n, state)
    final = torch.cat([state, *reversed(ended)]).unflatten(0, (-1, H))
    return torch.cat(before), final[layout.order.argsort()]


def _scores(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """A_ij = sum_c q_ic k_jc exp(b_ic - b_jc) for j <= i, else 0: [M, C, C] (eq. 4).

    q, k: [M, C, K]. b: [M, C, K] float64, cumulative log decay, falling along C. C a power of 2.

    The exponent is split about a middle token. For a query after it and a key before it both
    factors are at most 1, whatever the gates. Within one half a factor can be large: allowed where
    gates are mild, else the half is treated the same way, down to single tokens.
    """
    M, C, _ = q.shape
    if C == 1:
        return (q * k).sum(-1, keepdim=True)
    middle = b[:, C // 2 - 1 : C // 2].detach()  # any value gives the same result: no gradient
    reach = torch.maximum(b[:, :1] - middle, middle - b[:, -1:]).amax((1, 2))  # [M]
    mild = reach <= MILD
    if mild.all():
        return _factored(q, k, b, middle)
    if not mild.any():
        return _bisected(q, k, b, middle)
    order = mild.argsort(descending=True)
    parts = [int(mild.sum()), int((~mild).sum())]
    mild_parts, strong_parts = zip(*(x[order].split(parts) for x in (q, k, b, middle)), strict=True)
    return torch.cat([_factored(*mild_parts), _bisected(*strong_parts)])[order.argsort()]


def _factored(q: Tensor, k: Tensor, b: Tensor, middle: Tensor) -> Tensor:
    relative = (b - middle).to(q.dtype)
    return ((q * relative.exp()) @ (k * (-relative).exp()).mT).tril()


def _bisected(q: Tensor, k: Tensor, b: Tensor, middle: Tensor) -> Tensor:
    M, C, K = q.shape
    half = C // 2
    early, late = slice(None, half), slice(half, None)
    later_q = q[:, late] * (b[:, late] - middle).to(q.dtype).exp()
    earlier_k = k[:, early] * (middle - b[:, early]).to(k.dtype).exp()
    across = later_q @ earlier_k.mT  # [M, C / 2, C / 2]
    within = _scores(*(x.view(2 * M, half, K) for x in (q, k, b))).view(M, 2, half, half)
    top = torch.cat([within[:, 0], torch.zeros_like(across)], -1)
    return torch.cat([top, torch.cat([across, within[:, 1]], -1)], 1)


@dataclass(frozen=True)
class _Layout:
    """Where tokens go when sequences are cut into chunks; longest sequences first, step by step."""

    size: int  # tokens in a chunk, C
    running: list[int]  # sequences that have a chunk at each step; never grows
    order: Tensor  # [N]: sequences, the most chunks first
    slots: Tensor  # [M * C]: the row of a tensor [B * T * H, D] in each place, -1 for padding
    rows: Tensor  # [B * T * H]: the place of each row

    def cut(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [M, C, D], zeros in the padding."""
        return _Move.apply(x.flatten(0, 2), self.slots, self.rows).unflatten(0, (-1, self.size))

    def join(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """[M, C, D] -> [B, T, H, D] of the given shape."""
        return _Move.apply(x.flatten(0, 1), self.rows, self.slots).view(shape)


class _Move(torch.autograd.Function):
    """Rows of x [R, D] to their places; -1 takes zeros. The inverse move is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        moved = x.index_select(0, there.clamp(min=0))
        return moved.index_fill_(0, (there < 0).nonzero()[:, 0], 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.saved_tensors
        return _Move.apply(grad, back, there), None, None


def _plan(lengths: list[int], heads: int, device: torch.device) -> _Layout:
    """Cuts sequences of these lengths, joined in one row of tokens, into chunks of one size."""
    size = min(CHUNK_COST, key=lambda C: CHUNK_COST[C] * sum(-(-n // C) * C for n in lengths))
    length = torch.tensor(lengths)
    start = length.cumsum(0) - length
    chunks = (length + size - 1) // size  # of each sequence
    order = chunks.argsort(descending=True)
    running = [int((chunks > step).sum()) for step in range(int(chunks.max()))]

    sequence = torch.cat([order[:n] for n in running])  # of each chunk
    step = torch.arange(len(running)).repeat_interleave(torch.tensor(running))
    position = step[:, None] * size + torch.arange(size)  # in the sequence, [chunks, C]
    token = start[sequence, None] + position
    head = torch.arange(heads)[:, None]
    slots = token[:, None] * heads + head  # [chunks, H, C]
    slots.masked_fill_((position >= length[sequence, None])[:, None], -1)
    slots = slots.flatten()
    filled = (slots >= 0).nonzero()[:, 0]
    rows = torch.empty_like(filled)
    rows[slots[filled]] = filled
    return _Layout(size, running, order.to(device), slots.to(device), rows.to(device))
