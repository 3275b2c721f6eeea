"""Our GPU kernels beside those that they replace: time on the device, forward and backward.

    python benchmarks/kernels_gpu.py --out kernels.json

Shapes are those of Mamba 130M (d 1536) and 1.4B (d 4096), n 16, bf16. The peer is mamba_ssm's CUDA
scan, on [B, d, T] as it wants them, without the transposes that lead there. Packed rows: documents
of lognormal lengths in one row; the peer has them padded to the longest of 16, or in one row with a
separator of its own (input 0, a huge step) between two.

`--op causal_conv1d`: the convolution (W 4, SiLU) beside fla's in Triton, for a row of one document
and of many, with a frozen filter and a trained one (fla's computes a frozen one's gradient too).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_train.durable import write_atomically
from ssm_train.kernels.causal_conv1d.triton import causal_conv1d
from ssm_train.kernels.selective_scan.triton import selective_scan
from ssm_train.record.environment import describe_environment

STATES = 16
SHAPES = [(1, 2048, 1536), (1, 2048, 4096), (8, 2048, 4096), (1, 16384, 1536), (1, 16384, 4096)]
PACKED = (16384, 4096)  # tokens, channels
ROUNDS = 7


def device_ms(run: Callable[[], Any]) -> float:
    """Milliseconds in kernels of one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in profiler.key_averages()) / 1e3


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def ours(rows: int, length: int, channels: int, cu_seqlens: Tensor | None = None) -> Any:
    u, z, dt = (draw(rows, length, channels) for _ in range(3))
    dt = dt.detach().float().requires_grad_()
    B, C = (draw(rows, length, STATES) for _ in range(2))
    A = (-8 * torch.rand(channels, STATES, device="cuda")).requires_grad_()
    D = draw(channels, dtype=torch.float32)
    inputs = (u, dt, A, B, C, D, z)

    def forward() -> Tensor:
        return selective_scan(
            u, dt, A, B, C, D=D, z=z, cu_seqlens=cu_seqlens, dt_softplus=True
        )[0]  # fmt: skip

    return forward, with_backward(forward, inputs)


def theirs(rows: int, length: int, channels: int) -> Any:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, z, dt = (draw(rows, channels, length) for _ in range(3))
    B, C = (draw(rows, 1, STATES, length) for _ in range(2))
    A = (-8 * torch.rand(channels, STATES, device="cuda")).requires_grad_()
    D = draw(channels, dtype=torch.float32)

    def forward() -> Tensor:
        return selective_scan_fn(u, dt, A, B, C, D, z, None, True)

    return forward, with_backward(forward, (u, dt, A, B, C, D, z))


def convolutions(packed: bool, frozen: bool) -> tuple[str, Any, Any]:
    """A case's name, ours, and fla's."""
    from fla.modules.causal_conv1d import causal_conv1d as fla_conv1d

    tokens, channels = PACKED
    lengths = draw_lengths(tokens) if packed else [tokens]
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0) if packed else None
    x, weight, bias = draw(1, tokens, channels), draw(channels, 4), draw(channels)
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    inputs = (x,) if frozen else (x, weight, bias)
    options = {"activation": "silu", "cu_seqlens": offsets}

    def mine() -> Tensor:
        return causal_conv1d(x, weight, bias, **options)[0]

    def peer() -> Tensor:
        return fla_conv1d(x, weight, bias, backend="triton", **options)[0]

    torch.testing.assert_close(mine(), peer(), rtol=2**-6, atol=2**-6)
    name = f"{len(lengths)} documents, {tokens} tokens, d {channels}"
    name += ": frozen filter" if frozen else ": trained filter"
    return name, (mine, with_backward(mine, inputs)), (peer, with_backward(peer, inputs))


def with_backward(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    gradient = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def compare(name: str, mine: Any, peer: Any) -> dict[str, Any]:
    """Medians of alternating calls."""
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS + 2):  # two to warm up
        for side, (forward, both) in (("ours", mine), ("theirs", peer)):
            with torch.no_grad():
                times.setdefault(f"{side}_forward_ms", []).append(device_ms(forward))
            times.setdefault(f"{side}_ms", []).append(device_ms(both))
    row: dict[str, Any] = {k: statistics.median(v[2:]) for k, v in times.items()}
    row = {"case": name, **row, "ratio": row["theirs_ms"] / row["ours_ms"]}
    print(json.dumps({k: round(v, 3) if k != "case" else v for k, v in row.items()}), flush=True)
    return row


def draw_lengths(tokens: int, mean: float = 200.0, sigma: float = 0.8) -> list[int]:
    """Lengths whose sum is `tokens`."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        z = torch.randn((), generator=generator)
        drawn = int(mean * torch.exp(sigma * z - sigma**2 / 2))
        lengths.append(min(max(drawn, 8), left))
    return lengths


def scans() -> list[dict[str, Any]]:
    rows = [
        compare(f"{rows} x {length}, d {channels}", ours(rows, length, channels),
                theirs(rows, length, channels))
        for rows, length, channels in SHAPES
    ]  # fmt: skip
    tokens, channels = PACKED
    lengths = draw_lengths(tokens)
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    padded = [max(lengths[i : i + 16]) for i in range(0, len(lengths), 16)]
    longest = sum(padded) // len(padded)
    mine = ours(1, tokens, channels, offsets)
    name = f"{len(lengths)} documents, {tokens} tokens, d {channels}"
    rows.append(
        compare(f"{name}: separators", mine, theirs(1, tokens + len(lengths) - 1, channels))
    )
    rows.append(
        compare(f"{name}: padded, 16 a batch", mine, theirs(len(lengths), longest, channels))
    )
    return rows


OPS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "selective_scan": scans,
    "causal_conv1d": lambda: [
        compare(*convolutions(packed, frozen))
        for packed in (False, True)
        for frozen in (True, False)
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--op", choices=OPS, help="only this one")
    arguments = parser.parse_args()
    rows = [row for op in ([arguments.op] if arguments.op else OPS) for row in OPS[op]()]
    result = {"environment": describe_environment(), "rows": rows}
    write_atomically(arguments.out, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
