"""Tiny runs under each engine, on processes that torch spawns: the cases, and what starts them."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny_runs import LORA, LORA_GA, MODELS, PISSA, SIDES, SPARSE, stop_in_step, train, write_config

ROOT = Path(__file__).parents[2]
CALM = LORA | {"lora_dropout": 0.0}  # dropout differs between ranks by design
STOP = 9  # the step in which the run that is to go on elsewhere is stopped
COMMON = {"max_steps": 20, "eval_steps": 10, "save_steps": 10, "adam_epsilon": 1e-3}
FULL = {"learning_rate": 2e-3}  # at more, roundings grow tenfold in a few steps
# name -> family, changes; 4 examples a step.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gla_lora": ("gla", {"peft": CALM, "eval_gen": {"max_new_tokens": 8}}),
    "gla_full": ("gla", {"eval_gen": {"max_new_tokens": 8}}),
    "mamba_lora": ("mamba", {"peft": CALM, "task": SIDES}),
    "mamba_full": ("mamba", {}),
    "mamba_tied_full": ("mamba", {}),
    "gla_packed": ("gla", {"peft": CALM, "packing": True, "tokens_per_batch": 48}),
    "mamba_packed_full": ("mamba", {"packing": True, "tokens_per_batch": 48}),
    "gla_recomputed": ("gla", {"peft": CALM, "gradient_checkpointing": True}),
    "mamba_recomputed_full": ("mamba", {"gradient_checkpointing": True}),
    "gla_accumulated_full": ("gla", {}),
    "mamba_accumulated": ("mamba", {"peft": CALM}),
    "mamba_pissa": ("mamba", {"peft": PISSA}),
    "mamba_lora_ga": ("mamba", {"peft": LORA_GA}),
    "gla_dora": ("gla", {"peft": CALM | {"use_dora": True}}),
    "mamba_sparse": ("mamba", {"peft": SPARSE}),
    "gla_stopped_full": ("gla", {}),
    "mamba_stopped": ("mamba", {"peft": PISSA}),  # its changed base is in checkpoints
}
# Not compared with one process in fp32:
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "gla_bf16": ("gla", {"peft": CALM, "prec": "bf16"}),
    "mamba_bf16": ("mamba", {"peft": CALM, "prec": "bf16"}),
    "mamba_inf": ("mamba", {"peft": CALM, "max_steps": 6}),
}
FUSED = ("lora_linears", "sum_linear_cross_entropy")  # our operations that read past modules
# On GPUs a few, by the reference, so that there is no other difference than the engine.
DEVICE = os.environ.get("SSM_TRAIN_TEST_DEVICE", "cpu")
ON_GPU = ("gla_lora", "mamba_full", "gla_packed", "mamba_lora", "gla_stopped_full")
COMPARED = ON_GPU if DEVICE == "cuda" else tuple(CASES)
# Of DDP between hosts, where all weights train, which is another way.
BETWEEN_HOSTS = ("gla_full", "gla_accumulated_full", "gla_bf16", "mamba_bf16", "mamba_inf")
# Of optimizers on the host; else they are ZeRO-2 and ZeRO-3.
OFFLOADED = (
    "gla_lora", "gla_full", "mamba_full", "gla_packed", "mamba_accumulated", "mamba_sparse", *ODD
)  # fmt: skip
SHARDED = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2")
ENGINES = ("ddp", "ddp_hosts", *SHARDED)
NAMES = {"ddp": "DDP", "ddp_hosts": "DDP", "fsdp2": "FSDP2"} | {
    f"zero{stage}{offload}": f"ZeRO-{stage}" for stage in (1, 2, 3) for offload in ("", "_offload")
}


def cases_of(engine: str) -> list[str]:
    """What is trained under an engine."""
    some = BETWEEN_HOSTS if engine == "ddp_hosts" else OFFLOADED if "offload" in engine else None
    return [name for name in (*COMPARED, *ODD) if some is None or name in some]


def environment(engine: str) -> dict[str, str]:
    """What a launcher sets for an engine."""
    if engine == "ddp":
        return {}
    if engine == "ddp_hosts":  # a process a host, as far as they know
        return {"LOCAL_WORLD_SIZE": "1"}
    if engine == "fsdp2":
        return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    config = str(ROOT / "ds_configs" / f"{engine}.json")
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": config}


def cut(name: str, processes: int) -> dict[str, Any]:
    """How a step's examples, or rows, are cut into micro-batches."""
    if "packed" in name:
        return {"gradient_accumulation_steps": 4 // processes, "batch_size": None}
    if "accumulated" in name:
        return {"gradient_accumulation_steps": 4, "batch_size": 2 // processes}
    return {"batch_size": 4 // processes}


def write(directory: Path, name: str, processes: int, to: str = "") -> Path:
    """The config of a case, as `to`.yaml where it is another one's copy."""
    family, changes = (CASES | ODD)[name]
    model = {
        "model_type": family, "hidden_size": 32, "num_hidden_layers": 2,
        "tie_word_embeddings": "tied" in name, **MODELS[family],
    }  # fmt: skip
    rate = {} if "peft" in changes else FULL
    where = {"device": DEVICE, "kernels": "reference"} if DEVICE == "cuda" else {}
    changes = COMMON | rate | where | {"new_model": model} | changes | cut(name, processes)
    return write_config(directory, to or name, family, **changes)


# On a CPU processes are forked from one that has imported all this: most of a tiny run's time.
START = "forkserver" if DEVICE == "cpu" else "spawn"
PRELOADED = ["ssm_train.train", "ssm_train.adapters.gla", "ssm_train.adapters.mamba", "deepspeed"]
get_context("forkserver").set_forkserver_preload(PRELOADED)


def run_directory(directory: Path, name: str) -> Path:
    return directory / "output" / "train_seed42" / name


def spawn(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """`work(*arguments)` in each of so many processes that know each other's place."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    given = (port, processes, work, arguments)
    torch.multiprocessing.start_processes(start, given, processes, start_method=START)


def start(
    rank: int, port: int, processes: int, work: Callable[..., None], arguments: Sequence[Any]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        ACCELERATE_USE_CPU=str(DEVICE == "cpu").lower(),
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        work(*arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class Patch:
    setattr = staticmethod(setattr)


def run_all(engine: str, directory: Path, names: Sequence[str]) -> None:
    """Each rank. Every run of these names, in turn, under one engine."""
    os.environ.update(environment(engine))
    rank = int(os.environ["RANK"])
    for name in names:
        if "stopped" in name and rank == 1:
            stop_in_step(Patch, STOP)  # one rank's signal stops both
        if name == "mamba_inf" and rank == 1:
            spoil_a_loss(step=2)
        with seen_inside(engine) if name == "gla_bf16" else nullcontext(set()) as seen:
            result = train(directory / f"{name}.yaml")
        (directory / f"{name}-{rank}.json").write_text(
            json.dumps([result.outcome, result.steps, result.after, result.test, sorted(seen)])
        )


def run_made_again(engine: str, directory: Path, names: Sequence[str]) -> None:
    """The same with the kernels whose outputs are made again in the backward pass, which run in
    Triton's interpreter here, and under ZeRO-3 with every parameter in parts."""
    from ssm_train.engines import zero
    from ssm_train.kernels import again, causal_conv1d, pointwise, rms_norm

    made: list[str] = []
    unpack, fill_sizes = again.unpack, zero.fill_sizes

    def watch(kept: Any) -> torch.Tensor:
        made.extend([kept.maker.name()] if hasattr(kept, "maker") else [])
        return unpack(kept)

    def part_all(config: dict[str, Any], *others: Any) -> tuple[dict[str, Any], Any]:
        config, filled = fill_sizes(config, *others)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config, filled

    with ExitStack() as patches:
        for op in (rms_norm, causal_conv1d, pointwise):
            patches.enter_context(patch.object(op, "implementation", lambda *_: "triton"))
        patches.enter_context(patch.object(again, "unpack", watch))
        patches.enter_context(patch.object(zero, "fill_sizes", part_all))
        run_all(engine, directory, names)
    (directory / f"made-{os.environ['RANK']}.json").write_text(json.dumps(sorted(set(made))))


@contextmanager
def seen_inside(engine: str) -> Iterator[set[str]]:
    """What training steps do: the dtypes that projections give, and which of our fused operations
    run. The preflight and evaluations, which have the whole model, do not count. DeepSpeed switches
    autocast off around the model there, as it does by itself on a GPU only."""
    from ssm_train import loop
    from ssm_train.adapters import modules
    from ssm_train.peft import fused_lora

    seen: set[str] = set()
    under_way: list[int] = []  # the step, while it is

    def watch(owner: Any, name: str, describe: Callable[[Any], Iterable[str]]) -> Any:
        function = getattr(owner, name)

        def run(*inputs: Any, **options: Any) -> Any:
            outputs = function(*inputs, **options)
            seen.update(describe(outputs) if under_way else ())
            return outputs

        return patch.object(owner, name, run)

    train_step = loop.train_step

    def step(run: Any, number: int) -> Any:
        under_way.append(number)
        try:
            return train_step(run, number)
        finally:
            under_way.clear()

    with ExitStack() as stack:
        stack.enter_context(patch.object(loop, "train_step", step))
        stack.enter_context(watch(modules, "project", lambda ys: {str(y.dtype) for y in ys}))
        for owner, name in zip((fused_lora, modules), FUSED, strict=True):
            stack.enter_context(watch(owner, name, lambda _, name=name: {name}))
        if engine.startswith("zero"):
            from deepspeed.runtime import engine as deepspeed_engine

            stack.enter_context(patch.object(deepspeed_engine, "autocast_if_enabled", off))
        yield seen


@contextmanager
def off(_: Any) -> Iterator[None]:
    with torch.autocast(DEVICE, enabled=False):
        yield


def try_raw_reads(engine: str, config: Path) -> None:
    """Each rank. What comes of the loss reading the head's weight past its forward."""
    from ssm_train.adapters import head

    os.environ.update(environment(engine))

    def read(hidden: Any, lm_head: Any, positions: Any, targets: Any) -> torch.Tensor:
        logits = hidden.flatten(0, 1)[positions] @ head.stored_weight(lm_head).mT
        return head.sum_cross_entropy(logits, targets)

    head.target_loss = read
    try:
        train(config)
        said = "finished"
    except Exception as error:  # whatever it is: it stops
        said = f"{type(error).__name__}: {error}"
    config.with_name(f"raw-{os.environ['RANK']}.txt").write_text(said)


def try_cast(engine: str, config: Path) -> None:
    """Each rank. What comes of an engine that stores everything in bf16."""
    from ssm_train import fit

    os.environ.update(environment(engine))
    original = fit.check_dtypes_again

    def cast(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
        original(model)

    fit.check_dtypes_again = cast
    try:
        train(config)
        said = "finished"
    except AssertionError as error:
        said = str(error)
    config.with_name(f"cast-{os.environ['RANK']}.txt").write_text(said)


def try_to_free(engine: str, config: Path) -> None:
    """Each rank. How many of an engine's tensors live on when a run's second stage has its own."""
    from ssm_train.engines.zero import Zero

    os.environ.update(environment(engine))
    close, left = Zero.close, []

    def look(self: Any) -> None:
        moments = [x for state in self._base.state.values() for x in state.values()]
        held = [weakref.ref(x) for x in (*self._parts, *moments)]
        moments.clear()
        weights = list(self.bare.parameters())
        close(self)
        left.append(sum(x() is not None for x in held) + sum(p.numel() for p in weights))

    Zero.close = look
    train(config)
    config.with_name(f"left-{os.environ['RANK']}.json").write_text(json.dumps(left))


def go_on(engine: str, configs: Sequence[Path]) -> None:
    """Each rank. Resumes runs that were stopped under any engine."""
    os.environ.update(environment(engine))
    for config in configs:
        train(config, resume=True)


def spoil_a_loss(step: int) -> None:
    """This rank's loss of one micro-batch is infinite, with a gradient that is not."""
    from ssm_train import loop

    original, calls = loop.loss_of, iter(range(10**6))

    def loss_of(run: Any, batch: Any) -> torch.Tensor:
        return original(run, batch) + (math.inf if next(calls) == step else 0.0)

    loop.loss_of = loss_of


def copy_run(directory: Path, name: str, processes: int) -> Path:
    """A run again, to go on with another number of processes; returns its config."""
    again = f"{name}_{processes}"
    shutil.copytree(run_directory(directory, name), run_directory(directory, again))
    return write(directory, name, processes, again)
