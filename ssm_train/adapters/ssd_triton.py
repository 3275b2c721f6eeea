"""The SSD of Mamba-2 by mamba_ssm's Triton kernels, under the signature of ours: on a GPU, where
mamba_ssm is installed.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ssm_train.adapters.base import KernelChoice
from ssm_train.errors import InputError
from ssm_train.kernels.ssd import ssd

SSD = "mamba_ssm.ops.triton.ssd_combined"
REPAIR = (
    "build it for this torch: pip install --force-reinstall --no-deps --no-build-isolation "
    "mamba-ssm causal-conv1d; or set kernels: reference"
)


@cache
def available() -> bool:
    """Whether mamba_ssm is installed."""
    return find_spec("mamba_ssm") is not None


def implementation(kernels: KernelChoice, device: str | torch.device) -> str:
    """What runs the SSD of tensors on `device`; InputError where that is not what was asked for."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and kernels != "reference" and available():
        return "mamba_ssm (Triton)"
    if kernels == "triton":
        raise InputError(
            f"kernels: triton was asked for, but the SSD of Mamba-2 has none on {str(device)!r}"
            + (" without mamba-ssm (pip install mamba-ssm)" if on_gpu else "")
            + "; use kernels: auto"
        )
    return "reference"


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
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        initial_states=initial_state,
        seq_idx=documents,
        return_final_states=output_final_state,
    )
    return result if output_final_state else (result, None)
