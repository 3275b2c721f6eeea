"""Each engine on several GPUs of one host: tokens/s, memory, and what crosses between processes.

    python benchmarks/scaling_gpu.py gla-1.3b mamba-1.4b --gpus 2 --out scaling.json

Starts `accelerate launch` with the shipped accelerate_configs/, one launch a model, in which every
engine trains in turn: LoRA of rank 16 on all projections, and all weights, in bf16, on packed rows
of 16,384 tokens, one a GPU. One GPU alone goes first. Tokens/s are of all GPUs, without padding,
medians of the steps after the first ones; the share of linear is of one GPU without an engine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from collectives import CollectiveCount
from throughput import MODELS, SPECIAL, build_model, make_steps

from ssm_train import distributed, shares
from ssm_train.engines import Engine, build_engine
from ssm_train.engines.zero import Zero
from ssm_train.engines.zero_config import Numbers
from ssm_train.loop import Training, train_step
from ssm_train.metrics import peak_memory_gib
from ssm_train.optim import OptimSettings, build_optimizer
from ssm_train.record.environment import describe_environment
from ssm_train.schedule import Schedule

ROOT = Path(__file__).parents[1]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
TRAINS = ("lora", "full")


@contextmanager
def variables_of(engine: str) -> Iterator[None]:
    """What `accelerate launch` sets from the engine's shipped config."""
    config = yaml.safe_load((ROOT / f"accelerate_configs/one_node/{engine}_bf16.yaml").read_text())
    variables = {}
    if config["distributed_type"] == "DEEPSPEED":
        file = ROOT / config["deepspeed_config"]["deepspeed_config_file"]
        variables = {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
        }
    elif config["distributed_type"] == "FSDP":
        variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def measure(
    model: str, engine_name: str, trains: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All ranks. Some steps under one engine."""
    settings, full = OptimSettings(learning_rate=1e-5), trains == "full"
    left = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    assert left < 2**27, f"{left / 2**30:.1f} GiB are left of the engine before"
    with variables_of(engine_name):
        engine = build_engine(
            distributed.build_accelerator("bf16", "auto"), Numbers("bf16", 1, 1, 1.0, full)
        )
        rank, world = distributed.rank(), distributed.world_size()
        distributed.seed_everything(0)
        config = MODELS[model] | SPECIAL
        place = "meta" if engine.place == "meta" else str(engine.device)
        adapter, prepared = build_model(
            config, engine.device, rank=0 if full else 16, place=place,
            recompute=arguments.recompute or False,
        )  # fmt: skip
        if engine.place:
            engine.spread(prepared.model)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        weights = shares.measure(prepared.model, {})
        no_decay = prepared.traits.no_decay
        engine.prepare(prepared.model, lambda net: build_optimizer(net, settings, no_decay))
    del prepared
    gc.collect()
    torch.cuda.empty_cache()
    batches = make_steps(
        argparse.Namespace(
            steps=arguments.steps * world, warmup=(arguments.warmup + 1) * world, rows="packed",
            tokens=arguments.tokens,
        ),
        config["vocab_size"],
    )  # fmt: skip
    run = Training(
        engine=engine, token_losses=adapter.token_losses,
        micro_batches=lambda step: [batches[step * world + rank]],
        schedule=Schedule(10_000, 10_000, 10_000, 1, 1, 1), optim=settings, prec="bf16",
        log=lambda row: None, evaluate=None, save=None,
        cuda_graphs=engine.keeps_gradients and engine.device.type == "cuda",
    )  # fmt: skip
    engine.model.train()
    rates, losses = [], []
    for step in range(arguments.steps + arguments.warmup):
        began = time.perf_counter()
        status = train_step(run, step).read()
        seconds = time.perf_counter() - began
        losses.append(status.loss)
        if step >= arguments.warmup:
            rates.append(status.tokens / seconds)
    peak = peak_memory_gib()
    run.drop_graphs()
    with torch.autograd.set_multithreading_enabled(False), CollectiveCount() as counted:
        train_step(replace(run, cuda_graphs=False), arguments.steps + arguments.warmup)
    gathered = gather(engine) if arguments.gather else {}
    planned = {part.engine: part for part in shares.divide(weights, world, 1)}.get(engine.name)
    if isinstance(engine, Zero):
        engine.close()
    return {
        "tokens_per_second": median(rates), "peak_gib": peak, "losses": losses, **gathered,
        "exchanged": dict(counted.sizes),
        "planned": {
            "all_reduce": planned.reduced, "all_gather": planned.gathered,
            "reduce_scatter": planned.scattered,
        } if planned and world > 1 else {},
    }  # fmt: skip


def gather(engine: Engine) -> dict[str, float]:
    """All ranks. What a checkpoint and an evaluation take: seconds, and the peak on this GPU."""
    found = {}
    gc.collect()
    torch.cuda.empty_cache()
    for name in ("save", "evaluation"):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        if name == "save":
            (engine.trained(), engine.optimizer_state())
        else:
            with engine.whole():
                pass
        found[f"{name}_seconds"] = time.perf_counter() - began
        found[f"{name}_peak_gib"] = peak_memory_gib()
    return found


def work(arguments: argparse.Namespace) -> None:
    """All ranks. Every engine in turn; rank 0 writes."""
    found: dict[str, Any] = {}
    for trains in arguments.trains:
        for engine in arguments.engines:
            began = time.perf_counter()
            result = measure(arguments.models[0], engine, trains, arguments)
            gc.collect()
            torch.cuda.empty_cache()
            found.setdefault(trains, {})[engine] = result
            if distributed.is_main():
                print(
                    f"{arguments.models[0]} {trains} {engine} on {distributed.world_size()}: "
                    f"{result['tokens_per_second']:,.0f} tokens/s, {result['peak_gib']:.1f} GiB, "
                    f"loss {result['losses'][0]:.4f} to {result['losses'][-1]:.4f}, exchanged "
                    f"{show(result['exchanged'])}, planned {show(result['planned'])}"
                    f"{show_gathered(result)} "
                    f"({time.perf_counter() - began:.0f} s)",
                    flush=True,
                )
                arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def show_gathered(result: Mapping[str, Any]) -> str:
    if "save_seconds" not in result:
        return ""
    parts = [
        f"{name} {result[f'{name}_seconds']:.1f} s and {result[f'{name}_peak_gib']:.1f} GiB"
        for name in ("save", "evaluation")
    ]
    return ", to gather for " + ", for ".join(parts)


def show(sizes: Mapping[str, float]) -> str:
    said = [f"{kind} {size / 1e6:,.1f} MB" for kind, size in sizes.items() if size]
    return ", ".join(said) or "nothing"


def launch(model: str, gpus: int, engines: list[str], arguments: argparse.Namespace) -> Any:
    """What a launch of its own found; None, with its reason on the terminal, where it failed."""
    part = arguments.out.with_name(f"{arguments.out.stem}-{model}-{gpus}.json")
    config = ROOT / f"accelerate_configs/one_node/{'ddp' if gpus > 1 else 'single'}_bf16.yaml"
    options = ["--tokens", str(arguments.tokens), "--steps", str(arguments.steps)]
    options += ["--warmup", str(arguments.warmup)]
    if arguments.gather:
        options += ["--gather"]
    if arguments.recompute:
        options += ["--recompute", arguments.recompute]
    subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
            *("--num_processes", str(gpus), str(Path(__file__)), model, "--worker"),
            *("--engines", *engines, "--trains", *arguments.trains, "--out", str(part), *options),
        ],
        check=False,
    )
    return json.loads(part.read_text()) if part.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--trains", nargs="+", choices=TRAINS, default=list(TRAINS))
    parser.add_argument("--tokens", type=int, default=16384, help="of a row, one a GPU")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--warmup", type=int, default=6,
        help="steps before: rows of a shape run and are recorded before they are replayed",
    )  # fmt: skip
    parser.add_argument("--recompute", choices=("mixer", "mlp", "all"), help="to save memory")
    parser.add_argument("--gather", action="store_true", help="as for a save and an evaluation")
    parser.add_argument("--no-single", action="store_true", help="without one GPU alone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    results: dict[str, Any] = {"environment": describe_environment(), "models": {}}
    for model in arguments.models:
        alone = {} if arguments.no_single else launch(model, 1, ["single"], arguments) or {}
        together = launch(model, arguments.gpus, arguments.engines, arguments) or {}
        results["models"][model] = {"one GPU": alone, "together": together}
        for trains, engines in together.items():
            base = alone.get(trains, {}).get("single", {}).get("tokens_per_second")
            for engine, found in engines.items():
                if base:
                    found["share_of_linear"] = found["tokens_per_second"] / arguments.gpus / base
                    print(f"{model} {trains} {engine}: {found['share_of_linear']:.3f} of linear")
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
