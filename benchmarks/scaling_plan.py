"""The tables of docs/scaling.md: memory of each GPU and what it sends, under every engine.

    python benchmarks/scaling_plan.py

Nothing is measured and no GPU is needed: it is `ssm-train plan --gpus` for the configs in
cfg/scaling/, with 79.2 GiB a GPU, on one node of 8 and on several of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ssm_train.config import load_config
from ssm_train.plan import GIB, make_plan
from ssm_train.scaling import GB, Cluster, Outlook, look_ahead

CONFIGS = {
    "gla_1.3b_lora": "GLA 1.3B, LoRA of rank 16",
    "gla_1.3b_full": "GLA 1.3B, all weights",
    "mamba_1.4b_lora": "Mamba 1.4B, LoRA of rank 16",
    "mamba_1.4b_full": "Mamba 1.4B, all weights",
}
NETWORKS = {8: 400, 64: 50, 1024: 50}  # GPUs -> GB/s that each can send: NVLink, between nodes
MEMORY = 79.2 * GIB


def table(title: str, outlooks: list[Outlook]) -> Iterator[str]:
    gpus = [outlook.cluster.gpus for outlook in outlooks]
    yield f"| {title} | {' | '.join(f'GiB, {n:,}' for n in gpus)} | GB sent, {gpus[0]} | " + (
        " | ".join(f"ms, {n:,}" for n in gpus) + " |"
    )
    yield "|---" * (2 + 2 * len(gpus)) + "|"
    for columns in zip(*(outlook.parts for outlook in outlooks), strict=True):
        peaks = [
            f"{outlook.peak(part) / GIB:.1f}" + ("" if outlook.fits(part) else " (too much)")
            for outlook, part in zip(outlooks, columns, strict=True)
        ]
        times = [
            f"{1000 * (outlook.seconds(part) or 0):.1f}"
            for outlook, part in zip(outlooks, columns, strict=True)
        ]
        sent = f"{columns[0].sent(gpus[0]) / GB:.2f}"
        yield f"| {' | '.join([columns[0].engine, *peaks, sent, *times])} |"


def tables() -> Iterator[str]:
    directory = Path(__file__).parents[1] / "cfg" / "scaling"
    for name, title in CONFIGS.items():
        cfg, _ = load_config(directory / f"{name}.yaml", {}, {})
        plan = make_plan(cfg)
        clusters = [Cluster(gpus, MEMORY, net * GB) for gpus, net in NETWORKS.items()]
        yield from table(title, [look_ahead(cfg, plan, cluster) for cluster in clusters])
        yield ""


if __name__ == "__main__":
    print("\n".join(tables()), end="")
