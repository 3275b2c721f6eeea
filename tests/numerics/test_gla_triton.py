"""fla's kernels over packed documents as we launch them, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("fla", reason="fla needs Linux")

from fla.ops.common import chunk_h
from fla.ops.gla import chunk
from fla.ops.utils import cumsum
from fla.ops.utils.index import prepare_chunk_indices, prepare_chunk_offsets

from ssm_train.adapters.gla_triton import CHUNK, find_chunks, packed_gla
from ssm_train.kernels.gla import gla

DOCUMENTS = {
    "one": [0, 150],
    "every length around a chunk": [0, 63, 127, 192, 320],
    "of one token": [0, 1, 2, 66, 67],
    "empty ones": [0, 0, 70, 70, 71, 130, 130],
}


@pytest.mark.parametrize("ends", DOCUMENTS.values(), ids=DOCUMENTS)
def test_chunks_are_those_of_fla(ends: list[int]) -> None:
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    chunks = find_chunks(cu_seqlens, ends[-1])
    expected = prepare_chunk_indices(cu_seqlens, CHUNK)
    count = len(expected)
    assert torch.equal(chunks.indices[:count], expected)
    assert torch.equal(chunks.offsets[: len(ends)].long(), prepare_chunk_offsets(cu_seqlens, CHUNK))
    # The places too many: one empty document at the end of the row.
    assert set(chunks.indices[count:, 0].tolist()) <= {len(ends) - 1}
    assert chunks.cu_seqlens[-2:].tolist() == [ends[-1], ends[-1]]


class Step(int):
    """What `for i in range(...)` gives in a compiled kernel: a number with a `to`."""

    def to(self, _dtype: Any) -> Step:
        return self


def steps(*bounds: Any) -> Iterator[Step]:
    """`range` of an interpreted kernel, whose bounds may be its tensors."""
    numbers = (int(b.handle.data.item()) if hasattr(b, "handle") else int(b) for b in bounds)
    return map(Step, builtins.range(*numbers))


@pytest.fixture
def run_kernels(monkeypatch: pytest.MonkeyPatch, kernel_device: str) -> str:
    """Without tuning, which the interpreter cannot do."""
    if kernel_device == "cpu":
        monkeypatch.setattr(chunk_h, "range", steps, raising=False)
        for module in (chunk_h, chunk, cumsum):
            for kernel in vars(module).values():
                while hasattr(kernel, "fn") and not hasattr(kernel, "configs"):
                    kernel = kernel.fn
                if hasattr(kernel, "configs"):
                    monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    return kernel_device


def draw(length: int, heads: int, K: int, V: int, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, size, device=device) for size in (K, K, V))
    g = F.logsigmoid(torch.randn(1, length, heads, K, device=device)) / 16
    return [x.requires_grad_() for x in (q, k, v, g)]


@pytest.mark.parametrize("ends", DOCUMENTS.values(), ids=DOCUMENTS)
def test_values_and_gradients_follow_the_recurrence(ends: list[int], run_kernels: str) -> None:
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=run_kernels)
    tolerance = 1e-5 if run_kernels == "cpu" else 1e-2  # TF32 on a GPU
    results = []
    for ours in (True, False):
        inputs = draw(ends[-1], 2, 16, 32, run_kernels)
        if ours:
            o = packed_gla(*inputs, find_chunks(cu_seqlens, ends[-1]))
        else:
            o, _ = gla(*inputs, cu_seqlens=cu_seqlens)
        weight = torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o)
        results.append([o.detach(), *torch.autograd.grad((o * weight).sum(), inputs)])
    for name, found, expected in zip(("o", *"qkvg"), *results, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("normalizer", [16, 1], ids=["slow decay", "fast decay"])
@pytest.mark.parametrize("ends", [[0, 4096], list(range(0, 4097, 128))], ids=["long", "short"])
def test_bf16_has_its_rounding_error(ends: list[int], normalizer: int) -> None:
    """With states and products of q and k in bf16, against float64: docs/numerics.md."""
    torch.manual_seed(0)
    q, k, v, do = (
        torch.randn(1, 4096, 4, s, device="cuda").bfloat16() for s in (256, 256, 512, 512)
    )
    g = F.logsigmoid(torch.randn(1, 4096, 4, 256, device="cuda")) / normalizer
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device="cuda")
    inputs = [x.requires_grad_() for x in (q, k, v, g)]
    o = packed_gla(*inputs, find_chunks(cu_seqlens, 4096))
    found = [o, *torch.autograd.grad(o, inputs, do)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o = gla(*exact, cu_seqlens=cu_seqlens)[0]
    expected = [o, *torch.autograd.grad(o, exact, do.double())]
    bounds = {"o": 4e-3, "q": 3e-3, "k": 3e-3, "v": 4e-3, "g": 2.5e-3}
    for (name, bound), got, wanted in zip(bounds.items(), found, expected, strict=True):
        assert (got.double() - wanted).norm() < bound * wanted.norm(), name
