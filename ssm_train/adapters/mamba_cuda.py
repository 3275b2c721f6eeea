"""mamba_ssm's GPU kernels under the signatures of ours: the scan of Mamba-1 (CUDA) and the chunked
SSD of Mamba-2 (Triton). Used on a GPU where mamba_ssm is installed.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ssm_train.errors import InputError
from ssm_train.kernels.selective_scan import selective_scan
from ssm_train.kernels.ssd import ssd

SCAN = "mamba_ssm.ops.selective_scan_interface"
SSD = "mamba_ssm.ops.triton.ssd_combined"
REPAIR = (
    "build it for this torch: pip install --force-reinstall --no-deps --no-build-isolation "
    "mamba-ssm causal-conv1d; or set kernels: reference"
)
RESET = 1e6  # a step size after which exp(dt * A) is exactly 0 in fp32
STATE_STEP = 2.0**-40  # one that decays nothing, and by which a state is divided exactly


def available(device: str | torch.device) -> bool:
    """Whether tensors on `device` can go through mamba_ssm."""
    return torch.device(device).type == "cuda" and find_spec("mamba_ssm") is not None


@cache
def load_kernel(module: str, name: str) -> Any:
    """A function of mamba_ssm; InputError if it is installed but cannot be imported.

    Compiled parts built for another torch fail as ImportError or as the loader's OSError; a missing
    function as AttributeError.
    """
    try:
        return getattr(import_module(module), name)
    except (ImportError, OSError, AttributeError) as error:
        raise InputError(
            f"mamba_ssm is installed but broken ({' '.join(str(error).split())}); {REPAIR}"
        ) from error


def selective_scan_cuda(
    u: Tensor,  # [B, T, d]
    dt: Tensor,  # [B, T, d] fp32
    A: Tensor,  # [d, n]
    B: Tensor,  # [B, T, n], or [B, T, d, n]
    C: Tensor,  # the same
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = False,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.selective_scan`, by mamba_ssm's kernel, in fp32 (it wants one dtype for u and dt).

    The kernel has no initial state: n steps of a tiny size before the first token, of which step j
    writes the column j of the state and decays nothing, make one. It has no documents either: a
    separator of input 0 and a huge step size between two of them empties the state exactly, as
    exp(-1e6) is 0. It takes B and C for groups of channels, as many for both: one or d here. Its
    last state has no gradient: where one is needed, the plain path runs.
    """
    options: dict[str, Any] = {"D": D, "z": z, "output_final_state": output_final_state}
    step = initial_state is not None and u.shape[1] == 1  # decoding, token by token
    sources = [x for x in (u, dt, A, B, C, initial_state) if x is not None]
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in sources)
    if step or (output_final_state and trained):
        return selective_scan(u, dt, A, B, C, initial_state=initial_state, **options)
    assert not (output_final_state and cu_seqlens is not None), "packed rows have no cache"
    dtype, places = u.dtype, None
    if max(B.ndim, C.ndim) == 4:
        B, C = (x if x.ndim == 4 else x[:, :, None].expand(*u.shape, -1) for x in (B, C))
    inputs = [x.float() for x in (u, dt, B, C, *([] if z is None else [z]))]
    if cu_seqlens is not None or initial_state is not None:
        states = 0 if initial_state is None else A.shape[1]
        places, starts, length = lay_out(cu_seqlens, u.shape[1], states, u.device)
        inputs = [
            x.new_full((len(x), length, *x.shape[2:]), RESET if i == 1 else 0.0).index_copy(
                1, places, x
            )
            for i, x in enumerate(inputs)
        ]
        if initial_state is not None:
            u, dt, B, *others = inputs
            inputs = [*write_states(u, dt, B, initial_state, starts), *others]
    u, dt, B, C, *gate = (x.movedim(1, -1).contiguous() for x in inputs)  # [B, ..., T]
    result = load_kernel(SCAN, "selective_scan_fn")(
        u, dt, A, B, C, D, gate[0] if gate else None, return_last_state=output_final_state
    )
    y, state = result if output_final_state else (result, None)
    y = y.mT if places is None else y.mT.index_select(1, places)
    return y.to(dtype), state


def lay_out(
    cu_seqlens: Tensor | None, length: int, states: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """A row with `states` steps of our own before each document and a separator between two:
    places of the tokens [T], places of the documents' first tokens [N], its length."""
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
    documents = cu_seqlens.numel() - 1
    tokens = torch.arange(length, device=device)
    document = torch.searchsorted(cu_seqlens[1:-1], tokens.int(), right=True)
    places = tokens + states + document * (states + 1)
    return places, places[cu_seqlens[:-1].long()], length + states + (documents - 1) * (states + 1)


def write_states(
    u: Tensor, dt: Tensor, B: Tensor, state: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """u, dt, B of a row laid out, with the steps before each document that make it start from
    `state` [N, d, n] (N = 1: all of them)."""
    n, rows, documents = state.shape[-1], len(u), len(starts)
    places = (starts[:, None] - n + torch.arange(n, device=u.device)).flatten()
    columns = state.float().mT.expand(rows * documents, -1, -1).reshape(rows, -1, u.shape[-1])
    unit = torch.eye(n, device=u.device).repeat(documents, 1)  # [N * n, n]
    unit = unit if B.ndim == 3 else unit[:, None]
    return (
        u.index_copy(1, places, columns / STATE_STEP),
        dt.index_fill(1, places, STATE_STEP),
        B.index_copy(1, places, unit.expand(rows, -1, *B.shape[2:])),
    )


def ssd_triton(
    x: Tensor,  # [B, T, H, P]
    dt: Tensor,  # [B, T, H] fp32
    A: Tensor,  # [H]
    B: Tensor,  # [B, T, G, n]
    C: Tensor,  # [B, T, G, n]
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = False,
    D: Tensor | None = None,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor | None]:
    """`kernels.ssd` by mamba_ssm's Triton kernels. One token at a time takes the plain path, and so
    does a trained initial state, which is one for all rows and documents."""
    trained = initial_state is not None and (initial_state.requires_grad or cu_seqlens is not None)
    if x.shape[1] == 1 or trained or (initial_state is not None and len(initial_state) != len(x)):
        return ssd(
            x, dt, A, B, C, D=D, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    documents = None
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
        documents = torch.searchsorted(cu_seqlens[1:-1], tokens, right=True)[None].int()
    result = load_kernel(SSD, "mamba_chunk_scan_combined")(
        x.contiguous(),
        dt,
        A,
        B.contiguous(),
        C.contiguous(),
        chunk_size,
        D=D,
        initial_states=initial_state,
        seq_idx=documents,
        return_final_states=output_final_state,
    )
    return result if output_final_state else (result, None)
