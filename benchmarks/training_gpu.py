"""Training on one GPU beside what people use today, LoRA on all projections of random models.

    python benchmarks/training_gpu.py gla gla-tuned gla-small --out training.json

Each case has two arms that take turns in one process, each time with a new model; a rate is the
real tokens of all steps over their time, and a cell the median over the turns. Every adapter of
both arms must have moved at the end, else the case fails. Mamba's peers need mamba-ssm and
causal-conv1d.
The peers' kernels use the same stored choices as ours, and the peers see a few batches only, again
and again, after the longest one: their kernels are compiled anew for many lengths, which is not
timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from throughput import MODELS, SPECIAL, build_model, draw_examples

from ssm_train import distributed
from ssm_train.adapters.base import Batch
from ssm_train.data.batches import pack
from ssm_train.data.tokens import TokenizedDataset
from ssm_train.engines.replicated import Replicated
from ssm_train.loop import Training, train_step
from ssm_train.optim import OptimSettings, build_optimizer
from ssm_train.record.environment import describe_environment
from ssm_train.schedule import Schedule

RANK = 16
ROW = 16_384  # the default of tokens_per_batch
STRATA = 16  # batches that stand for all, where they are sorted by length
LONG = 4096  # tokens of a document of full fine-tuning
OPTIM = OptimSettings(learning_rate=1e-4, lr_scheduler_type="constant")


@dataclass
class Turn:
    tokens_per_second: float
    milliseconds: float  # an optimizer step
    tokens: float  # real ones of an optimizer step
    peak_gib: float
    loss: float


@dataclass
class Arm:
    """One side of a comparison: `train(steps)` gives the (seconds, real tokens, loss) of each."""

    name: str
    build: Callable[[], tuple[Any, Callable[[int], list[tuple[float, int, float]]]]]
    warmup: int = 12  # steps: kernels are compiled, graphs recorded
    turns: list[Turn] = field(default_factory=list)


def documents(vocabulary: int, length: int | None) -> Iterator[tuple[TokenizedDataset, np.ndarray]]:
    """The data, and one document after the other, without an end; all of one length, or None."""
    data = draw_examples(8192 if length is None else 256, vocabulary, length=length)
    while True:
        for index in range(len(data.lengths)):
            yield data, np.array([index])


def packed_rows(vocabulary: int, tokens: int, length: int | None = None) -> Iterator[Batch]:
    data, chosen, total = None, [], 0
    for data, index in documents(vocabulary, length):
        length = int(data.lengths[index[0]])
        if total + length > tokens:
            yield pack(data, np.array(chosen), tokens)
            chosen, total = [], 0
        chosen.append(int(index[0]))
        total += length


def ours(
    model: str,
    tokens: int = ROW,
    graphs: bool = True,
    targets: list[str] | str = "all-linear",
    full: bool = False,
    accumulation: int = 1,
) -> Callable[[], Any]:
    """Packed rows, `accumulation` of them a step; `full`: all weights are trained, on documents of
    4,096 tokens."""

    def build() -> Any:
        engine = Replicated(distributed.build_accelerator("bf16", "cuda"))
        distributed.seed_everything(0)
        config = MODELS[model] | SPECIAL
        adapter, prepared = build_model(config, "cuda", rank=0 if full else RANK, targets=targets)
        no_decay = prepared.traits.no_decay
        engine.prepare(prepared.model, lambda net: build_optimizer(net, OPTIM, no_decay))
        rows = packed_rows(config["vocab_size"], tokens, LONG if full else None)
        run = Training(
            engine=engine, token_losses=adapter.token_losses,
            micro_batches=lambda step: list(islice(rows, accumulation)),
            schedule=Schedule(10_000, 10_000, 10_000, 1, 1, 1), optim=OPTIM, prec="bf16",
            log=lambda row: None, evaluate=None, save=None, cuda_graphs=graphs,
        )  # fmt: skip
        engine.model.train()

        def train(steps: int) -> list[tuple[float, int, float]]:
            found, began = [], time.perf_counter()
            waiting = None
            for step in range(steps):  # read one step late, as the loop does
                report = train_step(run, step)
                if waiting is not None:
                    status = waiting.read()
                    now = time.perf_counter()
                    found.append((now - began, status.tokens, status.loss))
                    began = now
                waiting = report
            return found

        return engine.model, train

    return build


def trainer(
    model: str,
    batch_size: int,
    accumulation: int,
    tuned: bool = False,
    targets: list[str] | str = "all-linear",
    fused: bool = True,
) -> Callable[[], Any]:
    """HF Trainer, peft and the library's own model: padded rows, defaults. The first step has the
    longest batch of the data, which sets the peak. `tuned`: rows of similar length together and
    fla's fused loss. Not `fused`: Mamba's path that calls its projections,
    where their adapters live."""

    def build() -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            Trainer,
            TrainerCallback,
            TrainingArguments,
        )

        config = dict(MODELS[model] | SPECIAL)
        kind = config.pop("model_type")
        if kind == "gla":
            import fla.models  # noqa: F401  registers its models

            # The fused MLP reads the weight of down_proj past its LoRA.
            config |= {"fuse_swiglu": False}
            config |= {"fuse_linear_cross_entropy": tuned, "fuse_cross_entropy": not tuned}
        else:
            choose_path(fused)
        torch.manual_seed(0)
        with torch.device("cuda"):
            net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
        net = net.to(torch.bfloat16)
        net.config.model_type = "any"  # peft refuses out_proj of Mamba on all paths
        net = get_peft_model(
            net,
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM"),
        )
        net.config.model_type = kind
        data = draw_examples(8192, config["vocab_size"])
        order = np.random.default_rng(1).permutation(len(data.lengths))
        if tuned:  # group by length, as the Trainer's own option: blocks of 50 batches
            block = 50 * batch_size
            order = np.concatenate(
                [
                    b[np.argsort(-data.lengths[b], kind="stable")]
                    for b in np.split(order, range(block, len(order), block))
                ]
            )
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        longest = max(batches, key=lambda batch: int(data.lengths[batch].max()) * len(batch))
        if tuned:  # of all lengths alike
            batches.sort(key=lambda batch: int(data.lengths[batch].sum()))
            middles = (2 * np.arange(STRATA) + 1) * len(batches) // (2 * STRATA)
            batches = [batches[i] for i in middles]
        else:
            batches = batches[: max(accumulation, 4)]
        position = -accumulation

        def collate(_: Any) -> dict[str, torch.Tensor]:
            nonlocal position
            examples = longest if position < 0 else batches[position % len(batches)]
            position += 1
            lengths = data.lengths[examples]
            ids = np.zeros((len(examples), lengths.max()), dtype=np.int64)
            real = np.arange(lengths.max()) < lengths[:, None]
            learnt = np.zeros_like(real)
            ids[real], learnt[real] = data.join(examples)
            return {
                "input_ids": torch.from_numpy(ids),
                "attention_mask": torch.from_numpy(real.astype(np.int64)),
                "labels": torch.from_numpy(np.where(learnt, ids, -100)),
            }

        class Clock(TrainerCallback):
            def __init__(self) -> None:
                self.found: list[tuple[float, int, float]] = []

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.first = position

            def on_step_end(self, *_: Any, **__: Any) -> None:
                torch.cuda.synchronize()
                self.ends = getattr(self, "ends", [])
                self.ends.append((time.perf_counter(), position))

        def train(steps: int) -> list[tuple[float, int, float]]:
            clock = Clock()
            run = Trainer(
                model=net,
                args=TrainingArguments(
                    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch_size,
                    gradient_accumulation_steps=accumulation, max_steps=steps, bf16=True,
                    learning_rate=1e-4, lr_scheduler_type="constant", report_to=[],
                    save_strategy="no", logging_steps=1, disable_tqdm=True,
                    remove_unused_columns=False,
                ),
                train_dataset=[0] * 10**6, data_collator=collate, callbacks=[clock],
            )  # fmt: skip
            first = position
            run.train()
            losses = [row["loss"] for row in run.state.log_history if "loss" in row]
            positions = [first, *(p for _, p in clock.ends)]
            times = [t for t, _ in clock.ends]
            tokens = [
                sum(int(data.lengths[batches[i % len(batches)]].sum()) for i in range(a, b))
                for a, b in zip(positions[:-1], positions[1:], strict=True)
            ]
            return [(times[i] - times[i - 1], tokens[i], losses[i]) for i in range(1, len(times))]

        return net, train

    return build


def choose_path(fused: bool) -> None:
    """transformers' Mamba in training: the fused kernel, or its own alternative to it."""
    from transformers.models.mamba import modeling_mamba
    from transformers.models.mamba2 import modeling_mamba2

    for module, name in (
        (modeling_mamba, "mamba_inner_fn"),
        (modeling_mamba2, "mamba2_split_conv1d_scan_combined"),
    ):
        own = FUSED.setdefault(name, getattr(module, name))
        setattr(module, name, own if fused else lambda *args, **options: None)


FUSED: dict[str, Any] = {}


def plain_loop(model: str, tokens: int) -> Callable[[], Any]:
    """fla's model with its defaults and its fused loss, fp32 weights under bf16 autocast, packed
    documents of 4,096 tokens."""

    def build() -> Any:
        from fla.models import GLAConfig, GLAForCausalLM

        config = dict(MODELS[model] | SPECIAL)
        del config["model_type"]
        torch.manual_seed(0)
        with torch.device("cuda"):
            net = GLAForCausalLM(
                GLAConfig(**config, fuse_linear_cross_entropy=True, fuse_cross_entropy=False)
            )
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
        rows = packed_rows(config["vocab_size"], tokens, LONG)

        def train(steps: int) -> list[tuple[float, int, float]]:
            found, began = [], time.perf_counter()
            for _ in range(steps):
                batch = next(rows).to("cuda")
                labels = torch.full_like(batch.input_ids, -100)
                labels[0, batch.target_positions + 1] = batch.targets
                with torch.autocast("cuda", torch.bfloat16):
                    loss = net(batch.input_ids, labels=labels, cu_seqlens=batch.cu_seqlens).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                loss = loss.item()
                now = time.perf_counter()
                found.append((now - began, batch.num_tokens, loss))
                began = now
            return found

        return net, train

    return build


MAMBA = ["in_proj", "x_proj", "out_proj"]
"""dt_proj is read past its adapter on all paths of transformers."""
CASES: dict[str, tuple[Arm, Arm]] = {
    "gla": (
        Arm("ours", ours("gla-1.3b")),
        Arm("HF Trainer, batch 16", trainer("gla-1.3b", 16, 5), 3),
    ),
    "gla-tuned": (
        Arm("ours", ours("gla-1.3b")),
        Arm("HF Trainer, by length", trainer("gla-1.3b", 40, 2, tuned=True), 1 + STRATA // 2),
    ),
    "gla-lean": (
        Arm("ours, rows of 4,096", ours("gla-1.3b", tokens=4096, accumulation=4), 20),
        Arm("HF Trainer, batch 16", trainer("gla-1.3b", 16, 5), 3),
    ),
    "gla-small": (
        Arm("graphs", ours("gla-1.3b", tokens=2048)),
        Arm("without graphs", ours("gla-1.3b", tokens=2048, graphs=False)),
    ),
    "gla-full": (
        Arm("ours", ours("gla-1.3b", full=True)),
        Arm("plain loop", plain_loop("gla-1.3b", ROW), 3),
    ),
    "mamba": (
        Arm("ours", ours("mamba-1.4b", targets=["in_proj"])),
        Arm("HF Trainer, fused", trainer("mamba-1.4b", 8, 10, targets=["in_proj"]), 3),
    ),
    "mamba-unfused": (
        Arm("ours", ours("mamba-1.4b", targets=MAMBA)),
        Arm("HF Trainer", trainer("mamba-1.4b", 8, 10, targets=MAMBA, fused=False), 3),
    ),
    "mamba-small": (
        Arm("graphs", ours("mamba-1.4b", tokens=2048)),
        Arm("without graphs", ours("mamba-1.4b", tokens=2048, graphs=False)),
    ),
    "mamba2": (
        Arm("ours", ours("mamba2-1.3b", targets=["in_proj"])),
        Arm("HF Trainer, fused", trainer("mamba2-1.3b", 8, 10, targets=["in_proj"]), 3),
    ),
    "mamba2-unfused": (
        Arm("ours", ours("mamba2-1.3b")),
        Arm("HF Trainer", trainer("mamba2-1.3b", 8, 10, fused=False), 3),
    ),
}


def check_alive(name: str, net: torch.nn.Module) -> None:
    dead = [n for n, p in net.named_parameters() if "lora_B" in n and not p.any()]
    assert not dead, f"{name}: dead adapters, such as {dead[0]}"


def take_turn(arm: Arm, steps: int) -> Turn:
    torch.cuda.reset_peak_memory_stats()  # of all batches: those in a graph allocate nothing
    net, train = arm.build()
    train(arm.warmup)
    rows = train(steps + 2)[-steps:]
    check_alive(arm.name, net)
    seconds = float(np.mean([row[0] for row in rows]))  # batches by length differ in theirs
    tokens = float(np.mean([row[1] for row in rows]))
    peak = torch.cuda.max_memory_allocated() / 2**30
    return Turn(tokens / seconds, seconds * 1e3, tokens, peak, rows[-1][2])


def compare(arms: tuple[Arm, Arm], turns: int, steps: int) -> None:
    for _ in range(turns):
        for arm in arms:
            arm.turns.append(take_turn(arm, steps))
            print(f"  {arm.name}: {arm.turns[-1]}", flush=True)
            gc.collect()  # models and graphs have references in circles
            torch.cuda.empty_cache()


def draw(results: dict[str, Any], path: Path) -> None:
    """Tokens/s of both arms of each case, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.9 + 0.9 * len(results["cases"])), layout="constrained")
    axes = figure.subplots()
    names = []
    for case, found in results["cases"].items():
        for arm, turns in found.items():
            if arm != "ratio":
                rates = [turn["tokens_per_second"] for turn in turns]
                color = "tab:gray" if len(names) % 2 else "tab:blue"
                axes.barh(len(names), median(rates), color=color)
                axes.plot(rates, [len(names)] * len(rates), "k.", markersize=3)
                names.append(f"{case}: {arm}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s without padding; points: turns")
    axes.set_title(describe_gpu(results["environment"]), fontsize="small")
    figure.savefig(path, dpi=150)


def describe_gpu(environment: Any) -> str:
    names = ("torch", "triton", "transformers", "flash-linear-attention", "mamba-ssm")
    versions = [f"{name} {environment['packages'][name]}" for name in names]
    return f"{environment['gpus'][0]}, driver {environment['driver']}\n{', '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": describe_environment(), "cases": {}}
    for name in arguments.cases:
        print(name, flush=True)
        arms = CASES[name]
        compare(arms, arguments.turns, arguments.steps)
        middle = [median(turn.tokens_per_second for turn in arm.turns) for arm in arms]
        results["cases"][name] = {
            "ratio": middle[0] / middle[1],
            **{arm.name: [vars(turn) for turn in arm.turns] for arm in arms},
        }
        print(f"{name}: {middle[0]:,.0f} / {middle[1]:,.0f} tokens/s = {middle[0] / middle[1]:.2f}")
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        draw(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
