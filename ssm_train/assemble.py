"""From a config to its parts: the model with its tokenizer, the data's order, the evaluation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ssm_train import distributed
from ssm_train.adapters import registry
from ssm_train.adapters.base import (
    Batch,
    KernelChoice,
    ModelAdapter,
    ModelSpec,
    PeftMethod,
    Prepared,
)
from ssm_train.adapters.loading import read_config, save_model
from ssm_train.bases import base_run
from ssm_train.config import RunConfig, as_recorded, load_config
from ssm_train.data.batches import collate, pack
from ssm_train.data.order import Order, PackedOrder, accumulation_for, build_order
from ssm_train.data.sources import (
    find_chat_template,
    load_task_data,
    training_texts,
    why_no_test,
)
from ssm_train.data.tasks.task import Task
from ssm_train.data.tokens import TokenizedDataset
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.durable import replace_directory
from ssm_train.errors import InputError, near
from ssm_train.evaluation import Evaluation
from ssm_train.generate import Autocast, create_decoder
from ssm_train.metrics import LOSSES, count_records
from ssm_train.peft.spec import TWO_STAGES, PeftSpec
from ssm_train.record import MARKER
from ssm_train.terminal import say

FIXED_AT_START = (
    *("model", "new_model", "revision", "tokenizer", "peft", "peft_overrides", "prec", "seed"),
    *("data", "task", "max_length", "packing", "tokens_per_batch", "group_by_length", "debug"),
)
NEW_BASE = "base"  # directory of a run: the new model that its adapter belongs to
DEBUG_EXAMPLES = {"train": 8, "val": 2, "test": 2}
STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def base_id(cfg: RunConfig, run_dir: Path) -> str | None:
    """Hub id or directory of the model before training; None for one that is still to be made."""
    if cfg.model is None:
        kept = run_dir / NEW_BASE
        return str(kept) if kept.is_dir() and not cfg.overwrite else None
    directory = base_run(cfg)
    return cfg.model if directory is None else str(directory / "model")


def keep_new_base(cfg: RunConfig, run_dir: Path) -> Path:
    """Rank 0. An adapter on a new model is worth nothing without that model's random weights:
    makes them again from the seed, and writes them."""
    distributed.seed_everything(cfg.seed)
    prepared = prepare_model(cfg, None, "cpu", frozen=True).prepared
    with replace_directory(run_dir / NEW_BASE) as directory:
        save_model(prepared.model, directory)
        prepared.tokenizer.save_pretrained(directory)
    return run_dir / NEW_BASE


def debug_config(cfg: RunConfig) -> RunConfig:
    """One epoch of the few examples, which a batch must not outnumber."""
    share = max(1, DEBUG_EXAMPLES["train"] // distributed.launched_processes())
    few = {"batch_size": min(cfg.batch_size, share), "gradient_accumulation_steps": 1}
    return cfg.model_copy(update={"num_epochs": 1.0, "max_steps": None, **few})


def debug_peft(peft: PeftSpec) -> PeftSpec:
    """A warm-up of one step, which a debug run has room for."""
    if peft.peft_type not in TWO_STAGES:
        return peft
    return replace(peft, settings=peft.settings.model_copy(update={"num_warmup_it": 0}))


def check_same_run(cfg: RunConfig, run_dir: Path) -> tuple[RunConfig, list[str]]:
    """Compares a resumed run's config with the one it began with: the config, with what that one
    settled, and a line for each changed value.

    Raises InputError for a change after which its checkpoint would mean something else.
    """
    began, _ = load_config(run_dir / MARKER)
    notes = []
    if cfg.tokens_per_batch == "auto":
        cfg = as_recorded(cfg, began)
        notes.append(f"tokens_per_batch auto: {cfg.row_tokens:,} tokens, as the run began")
    before, now = (config.model_dump(exclude_none=True) for config in (began, cfg))
    for key in RunConfig.model_fields:
        old, new = before.get(key), now.get(key)
        if old == new or key in ("resume", "overwrite", "name"):
            continue
        if key in FIXED_AT_START:
            raise InputError(
                f"--resume: {key} was {old!r} when the run began and is {new!r} now; "
                "start a new run for it"
            )
        notes.append(f"resumed with {key} {new!r} instead of {old!r}")
    return cfg, notes


def choose_main_metric(cfg: RunConfig, task: Task) -> str:
    """What chooses the best checkpoint: `metric_for_best`, else the task's first metric, or the
    loss where nothing is generated. Raises InputError for one that this run does not measure."""
    answers = task.type == "classification" or cfg.eval_gen is not None
    scored = answers and not cfg.skip_eval
    known = [*(task.metrics if scored else ()), "loss", "perplexity"]
    metric = cfg.metric_for_best or known[0]
    if metric not in known:
        hint = near(metric, known) or f"; this run measures {', '.join(known)}"
        if metric in task.metrics and not cfg.skip_eval:
            hint = " without answers; set eval_gen, such as {max_new_tokens: 64}"
        raise InputError(f"metric_for_best: {metric!r} is not measured{hint}")
    if cfg.min_eval_metric_after_epoch and metric in LOSSES:
        raise InputError(
            f"min_eval_metric_after_epoch: the main metric is {metric}, where less is better; "
            "set eval_gen or metric_for_best"
        )
    return metric


def describe_measures(cfg: RunConfig, task: Task, main_metric: str) -> str:
    """What chooses the best checkpoint, and why not more is measured."""
    if cfg.skip_eval:
        return "no evaluation (skip_eval)"
    why = ""
    if task.type == "classification":
        if cfg.eval_gen is not None:
            why = "; eval_gen changes nothing, as classes are scored and not generated"
    elif cfg.eval_gen is None and task.metrics:
        why = f"; without eval_gen nothing is generated: no {', '.join(task.metrics)}"
    return f"best by {main_metric}{why}"


def find_splits(cfg: RunConfig) -> tuple[str, ...]:
    """Of train, val and test, those that this run reads."""
    if cfg.skip_eval:
        return ("train",)
    return ("train", "val") if why_no_test(cfg) else ("train", "val", "test")


def describe_untested(cfg: RunConfig, splits: Collection[str]) -> list[str]:
    """A line where a run that evaluates tests nothing at its end."""
    if cfg.skip_eval or "test" in splits:
        return []
    return [f"nothing is tested at the end: {why_no_test(cfg)}"]


@dataclass
class Subject:
    """A model that is to be trained, and what knows it."""

    adapter: ModelAdapter
    prepared: Prepared
    reason: str
    """Why this adapter, for the log."""
    method: PeftMethod | None = None
    """What was injected, once it was."""


def prepare_model(
    cfg: RunConfig, model: str | None, device: str, *, frozen: bool, place: str | None = None
) -> Subject:
    """The model with its tokenizer, and its adapter.

    `frozen`: the weights stay as they are and are stored in `prec`; else they train, in fp32.
    `place`: see `ModelSpec`.
    """
    with TemporaryDirectory() as directory:
        tokenizer = cfg.tokenizer
        if isinstance(tokenizer, dict):
            build_tokenizer(training_texts(cfg), tokenizer).save_pretrained(directory)
            tokenizer = directory
        spec = ModelSpec(
            model=model,
            new_model=cfg.new_model,
            tokenizer=tokenizer,
            adapter=cfg.adapter,
            revision=cfg.revision,
            dtype=STORAGE[cfg.prec] if frozen else torch.float32,
            kernels=select_kernels(cfg),
            gradient_checkpointing=cfg.gradient_checkpointing,
            device=device,
            place=place,
        )
        adapter, reason = registry.resolve(spec)
        if model is not None:  # a name may have routed it, and its tokenizer would be blamed next
            read_config(model, cfg.revision)
        if cfg.packing and "packing" not in adapter.traits.supports:
            raise InputError(f"packing: {adapter.name} models cannot be packed; set packing: false")
        if cfg.gradient_checkpointing and "grad_ckpt" not in adapter.traits.supports:
            raise InputError(
                f"gradient_checkpointing: {adapter.name} models cannot recompute layers; remove it"
            )
        prepared = adapter.prepare(spec)
        prepared.place = place
    if template := find_chat_template(cfg):
        prepared.tokenizer.chat_template = template  # saved with it
    return Subject(adapter, prepared, reason)


def select_kernels(cfg: RunConfig) -> KernelChoice:
    """`kernels`; where that is left open, another `backend` than "cuda" means plain PyTorch."""
    return "reference" if cfg.kernels == "auto" and cfg.backend != "cuda" else cfg.kernels


def load_examples(cfg: RunConfig, tokenizer: Any, split: str) -> TokenizedDataset:
    """The examples of train, val or test: of the last two the first `max_eval_examples`, with
    `debug` a few of each. Raises InputError where there is no tokenizer."""
    if tokenizer is None:
        raise InputError(
            "a new model has no tokenizer of its own: set tokenizer to a directory, a hub id, or "
            "{type: word, vocab_size: 5000}, which is built from the training data"
        )
    limits = [DEBUG_EXAMPLES[split]] if cfg.debug else []
    if split != "train" and cfg.max_eval_examples is not None:
        limits.append(cfg.max_eval_examples)
    with count_records(f"tokenizing {split}", distributed.is_main()) as progress:
        return load_task_data(
            cfg,
            tokenizer,
            split,
            limit=min(limits, default=None),
            progress=progress,
            say=say,
            once=distributed.work_once,
            ask_nodes=distributed.ask_nodes,
        )


def plan_order(cfg: RunConfig, train: TokenizedDataset, global_batch: int | None) -> Order:
    """The order of the training data; a resumed run keeps its `global_batch` on any world size."""
    world, accumulation = distributed.world_size(), cfg.gradient_accumulation_steps
    if global_batch is not None:
        batch_size = 1 if cfg.packing else cfg.batch_size
        accumulation = accumulation_for(global_batch, batch_size, world)
    return build_order(train.lengths, cfg, world, accumulation)


def make_batches(train: TokenizedDataset, order: Order, cfg: RunConfig, step: int) -> list[Batch]:
    """This rank's micro-batches of optimizer step `step`."""
    rows = order.rank_micro_batches(step, distributed.rank())
    if isinstance(order, PackedOrder):
        return [pack(train, row, cfg.row_tokens) for row in rows]
    return [collate(train, row) for row in rows]


def build_evaluation(
    cfg: RunConfig,
    adapter: ModelAdapter,
    dataset: TokenizedDataset,
    prepared: Prepared,
    autocast: Autocast,
) -> Evaluation:
    """How a split is evaluated: by loss, label tokens, or generation when `eval_gen` says how."""
    batch_size = cfg.eval_batch_size or 2 * cfg.batch_size
    decoder = None
    if cfg.eval_gen is not None:
        decoder = create_decoder(
            prepared.tokenizer, batch_size=batch_size, autocast=autocast, **cfg.eval_gen
        )
        decoder.check_prompts([dataset.prompt_ids(i).tolist() for i in range(len(dataset))])
    return Evaluation(
        dataset, prepared.tokenizer, adapter.token_losses, adapter.token_logits, batch_size,
        decoder, autocast, distributed.rank(), distributed.world_size(),
        distributed.gather_objects, distributed.reduce_sum,
    )  # fmt: skip
