"""Gated linear attention in plain PyTorch: the oracle for other implementations, and what runs
on CPU. Chunks of matrix products; a chunk whose gates are strong is bisected until they are mild.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_SIZES = (16, 32, 64)
# exp(40) times exp(40) is still finite in fp32, so factors of this size cannot overflow.
MILD = 40.0
# A gate below this closes the channel: exp(-1e4) is 0, and sums of -1e4 stay exact in float64.
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
    assert k.shape == g.shape == q.shape, (q.shape, k.shape, g.shape)
    assert v.shape == (B, T, H, V), (q.shape, v.shape)
    lengths = (T,) * B
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        assert B == 1 and offsets[0] == 0 and offsets[-1] == T, (q.shape, offsets)
        lengths = tuple(end - start for start, end in zip(offsets, offsets[1:], strict=False))
    dtype = torch.promote_types(v.dtype, torch.float32)
    if initial_state is None:
        initial_state = v.new_zeros(1, H, K, V, dtype=dtype)
    initial_state = initial_state.to(dtype).expand(len(lengths), H, K, V)
    with torch.autocast(q.device.type, enabled=False):
        run = _step if T == 1 and len(lengths) == B else _run_chunks
        q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
        q = q * (K**-0.5 if scale is None else scale)
        o, state = run(q, k, v, g, initial_state, lengths)
    return o.to(v.dtype), state if output_final_state else None


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """One token for each of B sequences, as in decoding."""
    q, k, v, g = (x.squeeze(1) for x in (q, k, v, g))  # [B, H, ...]
    state = g.exp()[..., None] * state + k[..., None] * v[..., None, :]
    return (q[..., None, :] @ state).transpose(1, 2), state


def _run_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The chunked form (section 4.3): within a chunk scores, between chunks a state."""
    H, K, V = initial_state.shape[1:]
    shape, layout = v.shape, _plan(lengths, H, q.device)
    q, k, v, g = (layout.cut(x) for x in (q, k, v, g))  # [M, C, K or V], M = chunks * H
    # Differences of b must keep what a weak gate says after a strong one: hence float64.
    b = g.clamp(min=CLOSED).double().cumsum(1)
    total = b[:, -1:]
    decay = total.exp().to(q.dtype).mT  # [M, K, 1]
    written = (k * (total - b).exp().to(k.dtype)).mT @ v  # [M, K, V]
    states, final = _pass_states(decay, written, initial_state, layout)
    o = (q * b.exp().to(q.dtype)) @ states
    o = torch.baddbmm(o, _scores(q, k, b), v)
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

    q, k: [M, C, K]. b: [M, C, K] float64, cumulative log decay, non-increasing along C.

    Exponents are taken about a middle token. Within a half of the sequence both factors of a
    later query and an earlier key are at most 1, whatever the gates; between tokens of the same
    half one factor may be large, which is allowed while the gates are mild.
    """
    M, C, _ = q.shape
    if C == 1:
        return (q * k).sum(-1, keepdim=True)
    half = C // 2
    middle = b[:, half - 1 : half].detach()  # any choice gives the same result: no gradient
    range_ = torch.maximum(b[:, 0] - middle[:, 0], middle[:, 0] - b[:, -1]).amax(-1)  # [M]
    mild = range_ <= MILD
    if mild.all():
        return _factored(q, k, b, middle)
    if not mild.any():
        return _bisected(q, k, b, middle)
    there = torch.cat([mild.nonzero()[:, 0], (~mild).nonzero()[:, 0]])
    back = there.argsort()
    n = int(mild.sum())
    q, k, b, middle = (x[there] for x in (q, k, b, middle))
    return torch.cat(
        [
            _factored(q[:n], k[:n], b[:n], middle[:n]),
            _bisected(q[n:], k[n:], b[n:], middle[n:]),
        ]
    )[back]


def _factored(q: Tensor, k: Tensor, b: Tensor, middle: Tensor) -> Tensor:
    q = q * (b - middle).to(q.dtype).exp()
    k = k * (middle - b).to(k.dtype).exp()
    return (q @ k.mT).tril()


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
        moved[there < 0] = 0
        return moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.saved_tensors
        return _Move.apply(grad, back, there), None, None


def _plan(lengths: tuple[int, ...], heads: int, device: torch.device) -> _Layout:
    size = 64
    length = torch.tensor(lengths)
    start = length.cumsum(0) - length
    chunks = (length + size - 1) // size  # per sequence
    order = chunks.argsort(descending=True, stable=True)
    running = [int((chunks > step).sum()) for step in range(int(chunks.max()))]
    sequence = torch.cat([order[:n] for n in running])  # of each chunk
    offset = torch.arange(len(running)).repeat_interleave(torch.tensor(running)) * size
    within = offset[:, None] + torch.arange(size)  # [chunks, C]: position in the sequence
    real = within < length[sequence, None]
    tokens = torch.where(real, start[sequence, None] + within, -1)
    slots = torch.where(
        real[:, None], tokens[:, None] * heads + torch.arange(heads)[:, None], -1
    )  # [chunks, H, C]
    rows = torch.empty(sum(lengths) * heads, dtype=torch.long)
    flat = slots.flatten()
    place = (flat >= 0).nonzero()[:, 0]
    rows[flat[place]] = place
    return _Layout(size, running, *(x.to(device) for x in (order, slots.flatten(), rows)))
