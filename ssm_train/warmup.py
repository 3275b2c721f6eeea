"""Tunes this GPU's kernels once for the shapes of a run: processes side by side compile, then one
measures. The model has random weights and few layers, as neither changes what is fastest."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ssm_train import distributed
from ssm_train.adapters import registry
from ssm_train.adapters.base import Batch, ModelAdapter, ModelSpec, Prepared
from ssm_train.assemble import STORAGE, select_kernels
from ssm_train.config import RunConfig
from ssm_train.data.batches import collate, pack
from ssm_train.data.tasks.corpus import CorpusTask
from ssm_train.data.tasks.random_tokens import prompt_length
from ssm_train.data.tokens import Chunk, TokenizedDataset
from ssm_train.errors import InputError
from ssm_train.peft.spec import load_peft
from ssm_train.plan import GIB, free_memory, settle_tokens
from ssm_train.shape import model_shape
from ssm_train.terminal import say

LAYERS = 2
LENGTH = 512  # tokens of a document, where the run has no max_length
MOST_PROCESSES = 16
PROCESS_TOKENS = 16_384
PROCESS_GIB = 5  # of GPU memory, for so many tokens of a layer of 2,048 channels


def tune(cfg: RunConfig, processes: int | None, out: Path | None) -> Path:
    """Tunes what a training step of `cfg` runs and writes the choices: to `out`, or to the user's
    file. Raises InputError where there is no GPU, or nothing to tune."""
    if cfg.device == "cpu" or not torch.cuda.is_available():
        raise InputError("warmup tunes kernels for the GPU that runs them, and there is none here")
    from ssm_train.kernels.choices import Gpu, write
    from ssm_train.kernels.tuning import collect, tune_anew

    began = time.perf_counter()
    device = distributed.build_accelerator(cfg.prec, cfg.device).device
    cfg, lines = settle_tokens(cfg, device)
    for line in lines:
        say(line)
    count = processes or count_processes(cfg, device)
    shape = shape_of(cfg)
    if count > 1:
        say(f"compiling in {count} processes")
        lost = compile_side_by_side(shape, count)
        minutes = (time.perf_counter() - began) / 60
        say(f"compiled after {minutes:.1f} minutes" + (f"; {lost} failed" if lost else ""))
    run_step(shape, device, tune_anew(say))
    if not (choices := collect()):
        raise InputError("this run has no kernels to tune: they are plain PyTorch, or of one kind")
    gpu = Gpu.at(device)
    file = out or gpu.user_file
    write(file, gpu, choices)
    tuned = sum(map(len, choices.values()))
    say(f"{tuned} choices in {file} after {(time.perf_counter() - began) / 60:.1f} minutes")
    return file


def count_processes(cfg: RunConfig, device: torch.device) -> int:
    """As many as there are cores, less two, and as have room on the GPU."""
    cores = len(os.sched_getaffinity(0)) - 2
    each = PROCESS_GIB * GIB * max(1.0, cfg.row_tokens / PROCESS_TOKENS)
    return max(1, min(cores, MOST_PROCESSES, int(free_memory(device) / each)))


def compile_side_by_side(cfg: RunConfig, count: int) -> int:
    """Each process compiles its share of the configurations; returns how many failed, which costs
    time and nothing else."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_part, args=(cfg, i, count)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(worker.exitcode != 0 for worker in workers)


def compile_part(cfg: RunConfig, index: int, count: int) -> None:
    """What process `index` of `count` does."""
    from ssm_train.kernels.tuning import compile_share

    torch.set_num_threads(1)
    device = distributed.select_device(cfg.device) or torch.device("cuda")
    try:
        run_step(cfg, device, compile_share(index, count))
    except RuntimeError as error:  # no room on the GPU
        say(f"process {index}: {' '.join(str(error).split())[:200]}")
        sys.exit(1)


# ---------------------------------------------------------------- a step


def shape_of(cfg: RunConfig) -> RunConfig:
    """The run with a new model in place of a checkpoint: of its sizes, with few layers."""
    values = model_shape(cfg)
    peft = load_peft(cfg.peft, cfg.peft_overrides.given())
    if not (peft and re.search(r"layers\W+\d", str(peft.dump()))):  # else it names single layers
        values["num_hidden_layers"] = LAYERS
    return cfg.model_copy(update={"model": None, "new_model": values})


def run_step(cfg: RunConfig, device: torch.device, tuning: AbstractContextManager[None]) -> None:
    """A forward and a backward pass as the run makes them; `tuning` is entered when the kernels'
    modules are loaded."""
    adapter, prepared = build_model(cfg, str(device))
    vocabulary = prepared.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    batch = make_batch(cfg, vocabulary).to(device)
    prepared.model.train()
    with tuning:
        with distributed.autocast(cfg.prec, device):
            loss = adapter.token_losses(prepared.model, batch).loss
        loss.backward()
        loss.item()  # an error on the device shows here


def build_model(cfg: RunConfig, device: str) -> tuple[ModelAdapter, Prepared]:
    """The new model with the run's PEFT method. Layers are recomputed, which saves memory and runs
    the same kernels."""
    peft = load_peft(cfg.peft, cfg.peft_overrides.given())
    spec = ModelSpec(
        new_model=cfg.new_model,
        adapter=cfg.adapter,
        dtype=torch.float32 if peft is None else STORAGE[cfg.prec],
        kernels=select_kernels(cfg),
        gradient_checkpointing=True,
        device=device,
    )
    adapter, _ = registry.resolve(spec)
    prepared = adapter.prepare(spec)
    if peft is not None:
        if hasattr(peft.settings, "layers_to_transform"):  # may not be there
            every_layer = {"layers_to_transform": None}
            peft = replace(peft, settings=peft.settings.model_copy(update=every_layer))
        peft.make().inject(prepared)
    return adapter, prepared


def make_batch(cfg: RunConfig, vocabulary: int) -> Batch:
    """A micro-batch of random tokens, of the run's shape; all examples have one length."""
    length = cfg.max_length or LENGTH
    if cfg.packing:
        length = min(length, cfg.row_tokens)
    count = cfg.row_tokens // length if cfg.packing else cfg.batch_size
    chunk = Chunk(
        ids=np.random.default_rng(0).integers(vocabulary, size=count * length, dtype=np.int32),
        learnt=np.tile(np.arange(length) >= prompt_length(length), count),
        lengths=np.full(count, length),
        prompt_lengths=np.full(count, prompt_length(length)),
    )
    examples = TokenizedDataset(CorpusTask(), "random tokens", [chunk], pad_id=0, eos_id=0)
    rows = np.arange(count)
    return pack(examples, rows, cfg.row_tokens) if cfg.packing else collate(examples, rows)
