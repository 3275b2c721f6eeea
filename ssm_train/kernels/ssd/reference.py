"""Mamba-2's scan in plain PyTorch: the oracle for other implementations, and what runs on CPU.

Chunks are matrix products; the state steps from chunk to chunk. Documents start new chunks.
"""

from __future__ import annotations

from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """State space duality (Mamba-2, arXiv 2405.21060, listing 1), with state in and out.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T    (each head: P x n)
        y_t = h_t C_t + D x_t

    Args:
        x: [B, T, H, P]. dt: [B, T, H] >= 0, after softplus and clamp; 0 passes the state
            unchanged. A: [H], negative. B, C: [B, T, G, n]; G divides H, and each group serves
            H / G heads in a row. D: [H].
        initial_state: [N, H, P, n], or [1, H, P, n] for all; zeros if None. N is B, or the
            number of documents.
        output_final_state: also return the states after the last token.
        cu_seqlens: [N + 1] offsets of documents packed into one row (B = 1); each starts from
            the initial state and sees nothing of the others.
        chunk_size: tokens per matrix product; changes speed and memory, not the result.

    Returns:
        y [B, T, H, P] in x's dtype, and the final states [N, H, P, n] or None. The state is
        fp32 (fp64 for fp64 inputs).
    """
    rows, length, heads, dim = x.shape
    groups, state_dim = B.shape[2:]
    assert heads % groups == 0, (heads, groups)
    lengths = [length] if cu_seqlens is None else cu_seqlens.diff().tolist()
    assert sum(lengths) == length and (cu_seqlens is None or rows == 1), (x.shape, lengths)
    chunk_size = min(chunk_size, max(lengths))
    chunks = [-(-tokens // chunk_size) for tokens in lengths]  # of each document

    dtype = torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        initial_state = x.new_zeros(1, heads, dim, state_dim)
    initial = initial_state.to(dtype).expand(len(lengths) * rows, -1, -1, -1)
    initial = initial.reshape(len(lengths), rows, groups, -1, state_dim)  # heads of a group joined

    def in_chunks(v: Tensor) -> Tensor:
        return _split_documents(v.to(dtype), lengths, chunks, chunk_size)

    with torch.autocast(x.device.type, enabled=False):
        y, final = _scan_chunks(
            in_chunks(x), in_chunks(dt), A.to(dtype), in_chunks(B), in_chunks(C), initial, chunks
        )
        y = _join_documents(y.flatten(1, 2), lengths, chunks, chunk_size)
        if D is not None:
            y = torch.addcmul(y, x.to(dtype), D.to(dtype)[:, None])
    final = final.reshape(-1, heads, dim, state_dim)
    return y.to(x.dtype), final if output_final_state else None


def _scan_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunks: list[int]
) -> tuple[Tensor, Tensor]:
    """y [R, K, Q, H, P] and final states [N, R, G, H/G * P, n].

    R rows of K chunks of Q tokens: x [R, K, Q, H, P], dt [R, K, Q, H], B, C [R, K, Q, G, n].
    Document i owns the next chunks[i] chunks and starts from initial[i], [R, G, H/G * P, n].
    """
    rows, num_chunks, size, heads, dim = x.shape
    groups = B.shape[3]
    B, C = B.transpose(2, 3), C.transpose(2, 3)  # [R, K, G, Q, n]

    def by_group(v: Tensor) -> Tensor:  # [R, K, Q, H, P] -> [R, K, G, Q, H/G * P]
        return v.reshape(rows, num_chunks, size, groups, -1).transpose(2, 3)

    # Differences of sums over a chunk lose digits where the decay is strong; float64 keeps them.
    exponent = (dt.double() * A.double()).cumsum(2)  # [R, K, Q, H], falling
    since_start = exponent.to(x.dtype).exp()[..., None]
    until_end = (exponent[:, :, -1:] - exponent).to(x.dtype).exp()[..., None]
    x = x * dt[..., None]

    # Inside a chunk: attention with scores C_i . B_j, decayed from j to i.
    exponent = exponent.transpose(2, 3)  # [R, K, H, Q]
    between = (exponent[..., :, None] - exponent[..., None, :]).to(x.dtype)
    future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    decay = between.masked_fill(future, -torch.inf).exp()
    scores = (C @ B.mT)[:, :, :, None] * decay.unflatten(2, (groups, -1))
    y = scores.flatten(2, 3) @ x.transpose(2, 3)  # [R, K, H, Q, P]

    # From chunk to chunk.
    added = by_group(x * until_end).mT @ B  # [R, K, G, H/G * P, n]
    kept = since_start[:, :, -1].expand(-1, -1, -1, dim)
    kept = kept.reshape(rows, num_chunks, groups, -1, 1)
    steps = zip(added.unbind(1), kept.unbind(1), strict=True)
    chunk_starts, finals = [], []
    for state, owned in zip(initial, chunks, strict=True):
        for add, keep in islice(steps, owned):
            chunk_starts.append(state)
            state = torch.addcmul(add, keep, state)
        finals.append(state)
    carried = C @ torch.stack(chunk_starts, 1).mT  # [R, K, G, Q, H/G * P]
    carried = carried.transpose(2, 3).reshape(x.shape)
    return torch.addcmul(y.transpose(2, 3), since_start, carried), torch.stack(finals)


def _split_documents(v: Tensor, lengths: list[int], chunks: list[int], size: int) -> Tensor:
    """[R, T, ...] -> [R, K, Q, ...], zeros (dt = 0: no change) after the end of each document."""
    documents = []
    for document, owned in zip(v.split(lengths, 1), chunks, strict=True):
        missing = owned * size - document.shape[1]
        documents.append(F.pad(document, (0, 0) * (v.ndim - 2) + (0, missing)))
    return torch.cat(documents, 1).unflatten(1, (-1, size))


def _join_documents(v: Tensor, lengths: list[int], chunks: list[int], size: int) -> Tensor:
    """[R, K * Q, ...] -> [R, T, ...], without the padding of each document."""
    documents = v.split([owned * size for owned in chunks], 1)
    return torch.cat([d[:, :n] for d, n in zip(documents, lengths, strict=True)], 1)
