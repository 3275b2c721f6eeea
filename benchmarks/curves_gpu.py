"""The losses of the same steps twice: ours in packed rows, the stock library in padded ones.

    python benchmarks/curves_gpu.py gla-1.3b mamba-1.4b mamba2-1.3b --out curves.json

Both arms begin with the same weights and adapters and see the same ten batches of 16 examples again
and again, in bf16, so that there is something to learn; ours as shipped (graphs, fused LoRA and
loss), the stock fla or transformers with plain peft in a plain loop. Mamba's adapters are on
`in_proj`, the only projection that the stock fast path calls.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from generation_gpu import ours, stock
from throughput import MODELS, SPECIAL, draw_examples

from ssm_train import distributed
from ssm_train.adapters import registry
from ssm_train.adapters.base import Batch, ModelSpec
from ssm_train.data.batches import collate, pack
from ssm_train.engines.replicated import Replicated
from ssm_train.loop import Training, train_step
from ssm_train.optim import OptimSettings, build_optimizer
from ssm_train.record.environment import describe_environment
from ssm_train.schedule import Schedule

BATCH, BATCHES = 16, 10
ROW = 8192
TARGETS = {"gla": "all-linear", "mamba": ["in_proj"], "mamba2": ["in_proj"]}
OPTIM = OptimSettings(learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.0)


def choose_batches(vocabulary: int, make: Callable[[Any, np.ndarray], Batch]) -> list[Batch]:
    """Ten batches, each short enough for a row."""
    data = draw_examples(BATCH * BATCHES * 4, vocabulary)
    groups = np.arange(len(data.lengths)).reshape(-1, BATCH)
    fitting = [group for group in groups if data.lengths[group].sum() <= ROW]
    return [make(data, group) for group in fitting[:BATCHES]]


def train_ours(net: torch.nn.Module, config: dict[str, Any], steps: int) -> list[float]:
    engine = Replicated(distributed.build_accelerator("bf16", "auto"))
    adapter, _ = registry.resolve(ModelSpec(new_model=config))
    batches = choose_batches(config["vocab_size"], lambda data, group: pack(data, group, ROW))
    engine.prepare(net, lambda model: build_optimizer(model, OPTIM, adapter.traits.no_decay))
    run = Training(
        engine=engine, token_losses=adapter.token_losses,
        micro_batches=lambda step: [batches[step % BATCHES]],
        schedule=Schedule(steps, steps, steps, 1, steps, steps), optim=OPTIM, prec="bf16",
        log=lambda row: None, evaluate=None, save=None, cuda_graphs=torch.cuda.is_available(),
    )  # fmt: skip
    engine.model.train()
    return [train_step(run, step).read().loss for step in range(steps)]


def train_stock(net: torch.nn.Module, config: dict[str, Any], steps: int) -> list[float]:
    device = next(net.parameters()).device
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=OPTIM.learning_rate, weight_decay=0.0, eps=OPTIM.adam_epsilon,
        betas=(OPTIM.adam_beta1, OPTIM.adam_beta2),
    )  # fmt: skip
    batches = choose_batches(config["vocab_size"], collate)
    net.train()
    losses = []
    for step in range(steps):
        batch = batches[step % BATCHES].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = net(batch.input_ids, attention_mask=batch.attention_mask).logits
        chosen = logits.flatten(0, 1)[batch.target_positions].float()
        loss = F.cross_entropy(chosen, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIM.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(model: str, steps: int) -> dict[str, Any]:
    config = MODELS[model] | SPECIAL
    torch.manual_seed(0)
    net = ours(config, TARGETS[config["model_type"]])
    theirs = stock(net, TARGETS[config["model_type"]])
    found = {"stock": train_stock(theirs, config, steps), "ours": train_ours(net, config, steps)}
    last = {name: float(np.mean(losses[-BATCHES:])) for name, losses in found.items()}
    print(f"{model}: {found['ours'][0]:.4f} to {last['ours']:.4f}; stock to {last['stock']:.4f}")
    return {**found, "last": last}


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    models = results["models"]
    figure = Figure(figsize=(4 * len(models), 3), layout="constrained")
    for axes, (name, found) in zip(
        figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True
    ):
        axes.plot(found["stock"], color="tab:gray", label="stock, padded")
        axes.plot(found["ours"], color="tab:blue", linestyle="--", label="ours, packed")
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": describe_environment(), "models": {}}
    for model in arguments.models:
        results["models"][model] = compare(model, arguments.steps)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        draw(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
