"""Training throughput of random models of real sizes: LoRA on all projections, bf16.

    python benchmarks/throughput.py --model gla-1.3b --rows padded --steps 20

Lengths are drawn from a log-normal distribution (mean about 200 tokens). Prints non-padding
tokens/s (median of the steps after warm-up), the time to the end of the first step, and the peak
memory; `--json FILE` keeps them with the machine's description.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ssm_train import distributed
from ssm_train.adapters import registry
from ssm_train.adapters.base import Batch, ModelAdapter, ModelSpec, Prepared
from ssm_train.data.batches import collate, pack
from ssm_train.data.tasks.quickstart import QUICKSTART
from ssm_train.data.tokens import Chunk, TokenizedDataset
from ssm_train.engines.replicated import Replicated
from ssm_train.loop import Training, train_step
from ssm_train.metrics import peak_memory_gib
from ssm_train.optim import OptimSettings, build_optimizer
from ssm_train.peft.spec import load_peft
from ssm_train.record.environment import describe_environment
from ssm_train.schedule import Schedule

SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "gla-1.3b": {
        "model_type": "gla", "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4,
        "intermediate_size": 5632, "vocab_size": 32000,
    },
    "gla-7b": {
        "model_type": "gla", "hidden_size": 4096, "num_hidden_layers": 32, "num_heads": 8,
        "intermediate_size": 11008, "vocab_size": 32000,
    },
    "gla-tiny": {
        "model_type": "gla", "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2,
        "intermediate_size": 256, "vocab_size": 1000,
    },
    "mamba-1.4b": {
        "model_type": "mamba", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 50280,
    },
    "mamba-tiny": {
        "model_type": "mamba", "hidden_size": 96, "num_hidden_layers": 2, "vocab_size": 1000,
        "time_step_rank": 16,
    },
    "mamba2-1.3b": {
        "model_type": "mamba2", "hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64,
        "head_dim": 64, "n_groups": 1, "vocab_size": 50288,
    },
}  # fmt: skip


def build_model(
    config: dict[str, Any],
    device: str | torch.device,
    *,
    rank: int = 16,
    targets: list[str] | str | None = None,
    recompute: bool | str = False,
    place: str | None = None,
) -> tuple[ModelAdapter, Prepared]:
    """Random weights, made where they stay or in `place`: in bf16 with LoRA on `targets` (None: all
    projections), or, with rank 0, in fp32 and all trained. `recompute`: "mixer", "mlp" or "all"."""
    spec = ModelSpec(
        new_model=config,
        dtype=torch.bfloat16 if rank else torch.float32,
        device=str(device),
        gradient_checkpointing=True if recompute == "all" else recompute,
        place=place or str(device),
    )
    adapter, _ = registry.resolve(spec)
    prepared = adapter.prepare(spec)
    if rank:
        given = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
        peft = load_peft(given)
        assert peft is not None
        with torch.device(spec.place or "cpu"):
            peft.make().inject(prepared)
    return adapter, prepared


def draw_examples(count: int, vocab_size: int, length: int | None = None) -> TokenizedDataset:
    """Random ids, of a long-tailed distribution of lengths or of one; loss on the last third of
    each example."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(5.0, 0.75, count), 16, 2048).astype(np.int64)
    if length is not None:
        lengths[:] = length
    prompts = lengths * 2 // 3
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    chunk = Chunk(
        ids=draw.integers(1, vocab_size, lengths.sum()).astype(np.int32),
        learnt=np.arange(lengths.sum()) - starts >= np.repeat(prompts, lengths),
        lengths=lengths,
        prompt_lengths=prompts,
    )
    return TokenizedDataset(QUICKSTART, "random", [chunk], pad_id=0, eos_id=0)


def make_steps(arguments: argparse.Namespace, vocab_size: int) -> list[Batch]:
    data = draw_examples(8192, vocab_size)
    batches, start = [], 0
    for _ in range(arguments.steps + arguments.warmup):
        if arguments.rows == "padded":
            examples = np.arange(start, start + arguments.batch_size)
            batches.append(collate(data, examples))
        else:
            ends = np.cumsum(data.lengths[start:])
            count = int(np.searchsorted(ends, arguments.tokens, side="right"))
            examples = np.arange(start, start + count)
            batches.append(pack(data, examples, arguments.tokens))
        start = int(examples[-1]) + 1
    return batches


def profile_step(step: Callable[[], Any]) -> dict[str, Any]:
    """One step under the profiler: its kernels by time, their number, the time the GPU is busy."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in kernels:
        seconds[event.name] += event.device_time_total / 1e6
        counts[event.name] += 1
    return {
        "launches": counts.total(),
        "busy_seconds": seconds.total(),
        "kernels": [[name, counts[name], s] for name, s in seconds.most_common()],
    }


def print_profile(profile: Mapping[str, Any], lines: int) -> None:
    print(f"{profile['launches']:,} launches, {profile['busy_seconds'] * 1e3:.1f} ms busy")
    for name, count, seconds in profile["kernels"][:lines]:
        print(f"  {seconds * 1e3:8.2f} ms {count:6,} x {name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--rows", choices=("padded", "packed"), default="padded")
    parser.add_argument("--batch-size", type=int, default=16, help="examples of a padded batch")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a packed row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recompute", choices=("mixer", "mlp", "all"), help="to save memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=int, default=0, help="list this many kernels of a step")
    arguments = parser.parse_args()

    began = time.perf_counter()
    engine = Replicated(distributed.build_accelerator("bf16", "auto"))
    distributed.seed_everything(0)
    config = MODELS[arguments.model] | SPECIAL
    adapter, prepared = build_model(
        config, engine.device, rank=arguments.rank, recompute=arguments.recompute or False
    )
    settings = OptimSettings(learning_rate=1e-4)
    no_decay = prepared.traits.no_decay
    engine.prepare(prepared.model, lambda model: build_optimizer(model, settings, no_decay))
    batches = make_steps(arguments, config["vocab_size"])
    print(f"model on {engine.device} after {time.perf_counter() - began:.0f} s", flush=True)
    run = Training(
        engine=engine, token_losses=adapter.token_losses,
        micro_batches=lambda step: [batches[step]],
        schedule=Schedule(10_000, 10_000, 10_000, 1, 1, 1), optim=settings, prec="bf16",
        log=lambda row: None, evaluate=None, save=None,
    )  # fmt: skip
    engine.model.train()
    rates, losses, first = [], [], 0.0
    for step in range(len(batches)):
        started = time.perf_counter()
        status = train_step(run, step).read()
        seconds = time.perf_counter() - started
        first = first or time.perf_counter() - began
        losses.append(status.loss)
        if step >= arguments.warmup:
            rates.append(status.tokens / seconds)
        print(
            f"step {step} loss {status.loss:.4f} {status.tokens / seconds:,.0f} tokens/s",
            flush=True,
        )
    result = {
        "model": arguments.model,
        "rows": arguments.rows,
        "kernels": prepared.kernels,
        "tokens_per_second": median(rates),
        "tokens_a_step": float(np.mean([b.num_tokens for b in batches])),
        "seconds_to_first_step": first,
        "peak_memory_gib": peak_memory_gib(),
        "losses": losses,
        "environment": describe_environment(),
    }
    print(
        f"{arguments.model} {arguments.rows}: {result['tokens_per_second']:,.0f} tokens/s without "
        f"padding, {result['tokens_a_step']:,.0f} tokens a step, first step done after "
        f"{first:.0f} s, {result['peak_memory_gib']:.1f} GiB"
    )
    if arguments.profile:
        result["profile"] = profile_step(lambda: train_step(run, len(batches) - 1).read())
        print_profile(result["profile"], arguments.profile)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
