"""fla's chunked GLA over packed documents, from its own kernels but without a wait for the device:
fla reads the number of chunks back in every layer; here a bound of it is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from fla.ops.common.chunk_h import chunk_bwd_kernel_dh, chunk_fwd_kernel_h
from fla.ops.gla.chunk import (
    chunk_gla_bwd_dA,
    chunk_gla_bwd_dqk_intra,
    chunk_gla_bwd_dqkg,
    chunk_gla_bwd_dv,
    chunk_gla_fwd_intra_gk,
    chunk_gla_fwd_o_gk,
)
from fla.ops.utils.constant import RCP_LN2
from fla.ops.utils.cumsum import chunk_local_cumsum
from torch import Tensor

from ssm_train.kernels.again import made_again

CHUNK = 64  # steps, as in fla


@dataclass(frozen=True)
class Chunks:
    """Where the documents of a row are, and their chunks: the same for all layers of a batch."""

    cu_seqlens: Tensor  # [N + 2]: the documents' offsets, and an empty one at the end
    offsets: Tensor  # [N + 2]: chunks before each document
    indices: Tensor  # [C, 2]: document of each chunk, and which of its chunks it is

    @property
    def options(self) -> dict[str, Any]:
        """What fla's functions want to know."""
        return {
            "cu_seqlens": self.cu_seqlens,
            "chunk_indices": self.indices,
            "chunk_size": CHUNK,
        }


def find_chunks(cu_seqlens: Tensor, length: int) -> Chunks:
    """The chunks of documents [N + 1 offsets] in a row of `length` steps, on the device.

    C is the most that N documents can have; places too many point into the empty document, where
    fla's kernels read and write nothing.
    """
    documents = len(cu_seqlens) - 1
    counts = (cu_seqlens.diff() + (CHUNK - 1)).div(CHUNK, rounding_mode="floor")
    offsets = F.pad(counts.cumsum(0), (1, 0))  # [N + 1]
    places = torch.arange(
        (length + (CHUNK - 1) * documents) // CHUNK, device=cu_seqlens.device, dtype=offsets.dtype
    )
    document = torch.searchsorted(offsets, places, right=True) - 1  # N: none of them
    indices = torch.stack([document, places - offsets[document]], 1)
    return Chunks(
        torch.cat([cu_seqlens, cu_seqlens[-1:]]),
        torch.cat([offsets, offsets[-1:]]).to(cu_seqlens.dtype),
        indices.to(cu_seqlens.dtype),
    )


def packed_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunks: Chunks) -> Tensor:
    """`kernels.gla.gla` over packed documents: q, k, g [1, T, H, K], v [1, T, H, V], g fp32."""
    scale = q.shape[-1] ** -0.5
    q, k, v, g = (x.contiguous() for x in (q, k, v, g))
    with made_again(g):
        o: Tensor = PackedGla.apply(q, k, v, g, scale, chunks)
    return o


class PackedGla(torch.autograd.Function):
    """fla's ChunkGLAFunction, with the states of all chunks launched from here."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, scale: float, chunks: Chunks):  # type: ignore[no-untyped-def]
        decay = chunk_local_cumsum(g, scale=RCP_LN2, **chunks.options)
        h = states(k, v, decay, chunks)
        A = chunk_gla_fwd_intra_gk(q, k, decay, scale=scale, **chunks.options).to(v.dtype)
        o = chunk_gla_fwd_o_gk(q, v, decay, A, h, scale=scale, **chunks.options)
        ctx.save_for_backward(q, k, v, g, A)
        ctx.scale, ctx.chunks = scale, chunks
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor):  # type: ignore[no-untyped-def]
        q, k, v, g, A = ctx.saved_tensors
        do, scale, options = do.contiguous(), ctx.scale, ctx.chunks.options
        decay = chunk_local_cumsum(g, scale=RCP_LN2, **options)
        del g  # it was made for this
        h = states(k, v, decay, ctx.chunks)
        dh = state_gradients(q, do, decay, scale, ctx.chunks, h)
        dv = chunk_gla_bwd_dv(k, decay, A, do, dh, **options)
        dA = chunk_gla_bwd_dA(v, do, scale=scale, **options)
        dq, dk = chunk_gla_bwd_dqk_intra(q, k, decay, dA, **options)
        dq, dk, dg = chunk_gla_bwd_dqkg(q, k, v, h, decay, do, dh, dq, dk, scale=scale, **options)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg, None, None


def states(k: Tensor, v: Tensor, decay: Tensor, chunks: Chunks) -> Tensor:
    """The state before each chunk, [C, H, K, V]."""
    _, T, H, K, V = *k.shape, v.shape[-1]
    h = k.new_empty(1, len(chunks.indices), H, K, V)
    chunk_fwd_kernel_h[grid(chunks, H, K, V)](
        k=k, v=v, h=h, g=None, g_gamma=None, gk=decay, gv=None, h0=None, ht=None,
        **launch(chunks, T, H, K, V),
    )  # fmt: skip
    return h


def state_gradients(
    q: Tensor, do: Tensor, decay: Tensor, scale: float, chunks: Chunks, h: Tensor
) -> Tensor:
    """The gradient of the state after each chunk, [C, H, K, V] as h."""
    _, T, H, K, V = *q.shape, do.shape[-1]
    dh = torch.empty_like(h)
    chunk_bwd_kernel_dh[grid(chunks, H, K, V)](
        q=q, g=None, g_gamma=None, gk=decay, gv=None, do=do, dh=dh, dht=None, dh0=None,
        scale=scale, HQ=H, NG=1, **launch(chunks, T, H, K, V),
    )  # fmt: skip
    return dh


def grid(chunks: Chunks, H: int, K: int, V: int) -> Any:
    documents = len(chunks.cu_seqlens) - 2
    return lambda meta: (triton.cdiv(K, meta["BK"]) * triton.cdiv(V, meta["BV"]) * documents * H,)


def launch(chunks: Chunks, T: int, H: int, K: int, V: int) -> dict[str, Any]:
    """What both kernels of states take: only the decay of key channels, chunk by chunk."""
    return {
        "cu_seqlens": chunks.cu_seqlens, "split_offsets": chunks.offsets,
        "T": T, "H": H, "K": K, "V": V, "BT": CHUNK, "BS": CHUNK,
        "USE_G": False, "USE_G_GAMMA": False, "USE_GK": True, "USE_GV": False,
        "STATE_V_FIRST": False,
    }  # fmt: skip
