"""Forward and backward of every kernel on CPU, against what it replaces: medians of alternating
runs, and how far the two results are apart. python benchmarks/kernels_cpu.py [--op OP] [--json F]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from fla.ops.gla.naive import naive_recurrent_gla
from torch import Tensor
from transformers.models.mamba.modeling_mamba import causal_conv1d_fn, mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from ssm_train.kernels.causal_conv1d import causal_conv1d
from ssm_train.kernels.gla import gla
from ssm_train.kernels.selective_scan import selective_scan
from ssm_train.kernels.ssd import ssd

Inputs = dict[str, Tensor]
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    replaces: str
    make_inputs: Callable[[], Inputs]
    ours: Run
    theirs: Run


@dataclass(frozen=True)
class Timing:
    op: str
    shape: str
    replaces: str
    ours_ms: float
    theirs_ms: float
    largest_difference: float  # of output and gradients, relative to the largest element


def selective_scan_case(rows: int, length: int, channels: int, states: int) -> Case:
    def make_inputs() -> Inputs:
        shape = (rows, length, channels)
        return {
            "u": torch.randn(shape),
            "dt": F.softplus(torch.randn(shape) - 3),
            "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
            "B": torch.randn(rows, length, states),
            "C": torch.randn(rows, length, states),
            "D": torch.ones(channels),
            "z": torch.randn(shape),
        }

    def theirs(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor):
        y = mamba_selective_scan(u.mT, dt.mT, A, B.mT, C.mT, D=D, z=z.mT, use_mambapy=True)
        return y.mT

    return Case(
        op="selective_scan",
        shape=f"B={rows} T={length} d={channels} n={states}",
        replaces="transformers, use_mambapy",
        make_inputs=make_inputs,
        ours=lambda **inputs: selective_scan(**inputs)[0],
        theirs=theirs,
    )


def ssd_case(rows: int, length: int, heads: int, dim: int, states: int) -> Case:
    def make_inputs() -> Inputs:
        return {
            "x": torch.randn(rows, length, heads, dim),
            "dt": F.softplus(torch.randn(rows, length, heads) - 3),
            "A": -torch.linspace(1, 16, heads),
            "B": torch.randn(rows, length, 1, states),
            "C": torch.randn(rows, length, 1, states),
            "D": torch.ones(heads),
        }

    return Case(
        op="ssd",
        shape=f"B={rows} T={length} H={heads} P={dim} n={states} G=1",
        replaces="transformers, chunks of 256",
        make_inputs=make_inputs,
        ours=lambda **inputs: ssd(**inputs)[0],
        theirs=lambda **inputs: mamba2_chunk_scan(
            hidden_states=inputs.pop("x"), chunk_size=256, **inputs
        ),
    )


def gla_case(rows: int, length: int, heads: int, K: int, V: int, gates: str) -> Case:
    """Gates of fla's default layer are logsigmoid(x) / 16."""
    log_decay_factor = {"typical": 1 / 16, "strong": 4.0}[gates]

    def make_inputs() -> Inputs:
        shape = (rows, length, heads, K)
        return {
            "q": torch.randn(shape),
            "k": torch.randn(shape),
            "v": torch.randn(rows, length, heads, V),
            "g": F.logsigmoid(torch.randn(shape)) * log_decay_factor,
        }

    return Case(
        op="gla",
        shape=f"B={rows} T={length} H={heads} K={K} V={V} {gates}",
        replaces="fla, naive recurrence",
        make_inputs=make_inputs,
        ours=lambda **inputs: gla(**inputs)[0],
        theirs=lambda q, k, v, g: naive_recurrent_gla(q, k, v, g)[0],
    )


def causal_conv1d_case(rows: int, length: int, channels: int, width: int) -> Case:
    def make_inputs() -> Inputs:
        return {
            "x": torch.randn(rows, length, channels),
            "weight": torch.randn(channels, width),
            "bias": torch.randn(channels),
        }

    return Case(
        op="causal_conv1d",
        shape=f"B={rows} T={length} d={channels} W={width}",
        replaces="transformers",
        make_inputs=make_inputs,
        ours=lambda **inputs: causal_conv1d(**inputs, activation="silu")[0],
        theirs=lambda x, weight, bias: causal_conv1d_fn(x.mT, weight, bias, "silu").mT,
    )


CASES = (
    gla_case(rows=2, length=256, heads=4, K=64, V=128, gates="typical"),
    gla_case(rows=2, length=1024, heads=4, K=64, V=128, gates="typical"),
    gla_case(rows=2, length=256, heads=4, K=64, V=128, gates="strong"),
    gla_case(rows=2, length=1024, heads=4, K=64, V=128, gates="strong"),
    selective_scan_case(rows=2, length=256, channels=512, states=16),
    selective_scan_case(rows=2, length=1024, channels=512, states=16),
    ssd_case(rows=2, length=256, heads=16, dim=64, states=64),
    ssd_case(rows=2, length=1024, heads=16, dim=64, states=64),
    causal_conv1d_case(rows=2, length=256, channels=1024, width=4),
    causal_conv1d_case(rows=2, length=1024, channels=1024, width=4),
)


def measure(case: Case, runs: int) -> Timing:
    torch.manual_seed(0)
    inputs = {name: v.requires_grad_() for name, v in case.make_inputs().items()}
    weights = torch.randn_like(case.ours(**inputs))

    def step(run: Run) -> tuple[float, list[Tensor]]:
        start = time.perf_counter()
        y = run(**inputs)
        gradients = torch.autograd.grad(y, list(inputs.values()), weights)
        return (time.perf_counter() - start) * 1e3, [y, *gradients]

    differences = [
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip(step(case.ours)[1], step(case.theirs)[1], strict=True)
    ]
    pairs = [(step(case.ours)[0], step(case.theirs)[0]) for _ in range(runs)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Timing(case.op, case.shape, case.replaces, ours, theirs, max(differences))


def describe_machine() -> dict[str, str | int]:
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", help="only the cases of this op")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'op':16}{'shape':36}{'ours ms':>9}{'theirs':>9}{'ratio':>7}{'differ':>9}  replaces")
    timings = []
    for case in CASES:
        if args.op in (None, case.op):
            t = measure(case, args.runs)
            timings.append(asdict(t))
            ratio = t.theirs_ms / t.ours_ms
            print(
                f"{t.op:16}{t.shape:36}{t.ours_ms:9.1f}{t.theirs_ms:9.1f}{ratio:6.1f}x"
                f"{t.largest_difference:9.0e}  {t.replaces}"
            )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "timings": timings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
