"""A run that may begin: model, data and PEFT, proven before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from ssm_train import distributed, graphs
from ssm_train.adapters.base import Batch, LossSum
from ssm_train.assemble import (
    Subject,
    base_id,
    build_evaluation,
    load_examples,
    make_batches,
    plan_order,
    prepare_model,
)
from ssm_train.bases import check_base
from ssm_train.checkpoint import Checkpoint
from ssm_train.config import RunConfig
from ssm_train.data.batches import collate
from ssm_train.data.order import Order
from ssm_train.data.tokens import TokenizedDataset
from ssm_train.engines import Engine, build_engine
from ssm_train.engines.zero_config import Numbers
from ssm_train.errors import InputError
from ssm_train.evaluation import Evaluation
from ssm_train.health.preflight import compile_kernels, prove, tell_compiling
from ssm_train.optim import lr_at
from ssm_train.peft.sd_lora import SdLoraMethod
from ssm_train.peft.spec import PeftSpec
from ssm_train.plan import settle_tokens
from ssm_train.record import WARMUP
from ssm_train.record.runlog import show_batches
from ssm_train.resume import find_resume_point
from ssm_train.schedule import Schedule, plan_schedule
from ssm_train.stop_flag import StopFlag
from ssm_train.terminal import say


@dataclass
class Ready:
    """A run that may begin: its parts are built, its tensors are alive, nothing is written."""

    run_dir: Path
    cfg: RunConfig
    engine: Engine
    subject: Subject
    base: str | None  # id of the model before training; None: new, and not kept yet
    data: Mapping[str, TokenizedDataset]  # by split
    order: Order
    evaluations: Mapping[str, Evaluation]  # by split
    found: Checkpoint | None  # where a resumed run goes on, in the stage that it is in
    notes: list[str]
    stop: StopFlag = field(default_factory=StopFlag)
    """Set by signals from when `run_in` enters it, through all stages."""

    def __post_init__(self) -> None:
        alone = distributed.world_size() == 1 and self.engine.keeps_gradients
        if self.cfg.oom == "shrink" and not alone:
            raise InputError(
                f"oom: shrink is for one process, and this is {self.engine.name} with "
                f"{distributed.world_size()}: a step cannot begin again there; set oom: stop"
            )

    @property
    def schedule(self) -> Schedule:
        return plan_schedule(self.cfg, self.order.steps_per_epoch)

    @property
    def cuda_graphs(self) -> bool:
        """Whether to record them. Raises InputError where they are asked for and cannot be."""
        cfg = self.cfg
        reason = graphs.obstacle(
            self.engine.device, cfg.packing, cfg.prec, bool(cfg.gradient_checkpointing)
        )
        if not self.engine.keeps_gradients:
            reason = f"under {self.engine.name} gradients cross processes in the backward pass"
        if cfg.cuda_graphs and reason:
            raise InputError(f"cuda_graphs: true cannot be, because {reason}; remove it")
        return cfg.cuda_graphs is not False and reason is None

    @property
    def proves_isolation(self) -> bool:
        return self.cfg.packing and self.cfg.packing_check

    @property
    def warms_up(self) -> bool:
        """Whether the method's first stage is still to be trained, or to be ended."""
        method = self.subject.method
        return isinstance(method, SdLoraMethod) and method.stage == WARMUP

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's part of optimizer step `step`."""
        batches = make_batches(self.data["train"], self.order, self.cfg, step)
        show_batches(batches)
        return batches

    def examples(self) -> Iterator[Batch]:
        """The training examples in the order of training, one a batch; on every rank the same."""
        for step in count():
            for row in self.order.micro_batches(step):
                for i in range(len(row)):
                    yield collate(self.data["train"], row[i : i + 1])

    def token_losses(self, model: nn.Module, batch: Batch) -> LossSum:
        """Loss over the targets of a batch, in the run's precision."""
        with distributed.autocast(self.cfg.prec, self.engine.device):
            return self.subject.adapter.token_losses(model, batch)

    def token_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits at the targets of a batch, in the run's precision."""
        with distributed.autocast(self.cfg.prec, self.engine.device):
            return self.subject.adapter.token_logits(model, batch)


def get_ready(
    run_dir: Path,
    cfg: RunConfig,
    splits: Sequence[str],
    peft: PeftSpec | None,
    given: Subject | None,
) -> Ready:
    """All ranks. Model, data, PEFT and the proof that every trainable tensor is alive."""
    engine = build_engine(
        distributed.build_accelerator(cfg.prec, cfg.device),
        Numbers(
            cfg.prec, 1 if cfg.packing else cfg.batch_size, cfg.gradient_accumulation_steps,
            cfg.max_grad_norm, trains_all=peft is None and given is None,
        ),
    )  # fmt: skip
    device = engine.device
    distributed.set_matmul_precision(cfg.tf32)
    cfg, settled = settle_tokens(cfg, device)
    distributed.seed_everything(cfg.seed)
    base = base_id(cfg, run_dir)
    if cfg.resume and cfg.model is not None:
        check_base(run_dir, str(base))
    whole = given is not None or (peft is not None and peft.needs_whole_model)
    subject = given or prepare_model(
        cfg, base, str(device), frozen=peft is not None, place=None if whole else engine.place
    )
    data = {split: load_examples(cfg, subject.prepared.tokenizer, split) for split in splits}
    if peft and not given:
        subject.method = peft.make()
    if cfg.new_model:  # an adapter begins on a base that is read again as on one that is made
        distributed.seed_everything(cfg.seed)
    found, notes = begin(run_dir, cfg, subject, inject=given is None)
    method, prepared = subject.method, subject.prepared
    order = plan_order(cfg, data["train"], found.state["global_batch"] if found else None)
    ready = Ready(run_dir, cfg, engine, subject, base, data, order, {}, found, notes)
    if ready.cuda_graphs:
        notes.append("forward and backward are recorded as CUDA graphs")
    if distributed.is_main():  # rank 0; now, as the next lines may compile for minutes
        for note in [*settled, *prepared.notes]:
            say(note)
    if isinstance(method, SdLoraMethod) and ready.warms_up:
        check_warmup(cfg, method.warmup_steps, ready.schedule.total_steps)
    if method and found and "base" in found.tensors:  # a resumed run takes its checkpoint's
        method.restore_base(prepared.model, found.tensors["base"])
    model = prepared.model if whole else engine.spread(prepared.model)
    with tell_compiling(device, say):
        compile_kernels(ready, model)
        if method and not found:
            method.calibrate(prepared, ready.examples(), ready.token_losses)
        prove(ready, model)
    autocast = partial(distributed.autocast, cfg.prec, device)
    ready.evaluations = {
        split: build_evaluation(cfg, subject.adapter, data[split], subject.prepared, autocast)
        for split in splits
        if split != "train"
    }
    return ready


def begin(
    run_dir: Path, cfg: RunConfig, subject: Subject, inject: bool
) -> tuple[Checkpoint | None, list[str]]:
    """All ranks. The method in its model, at the stage where the run begins or goes on, and where
    that is. `inject` False: it is in the model already, at its first stage."""
    method, prepared = subject.method, subject.prepared
    found, notes = find_resume_point(run_dir) if cfg.resume else (None, [])
    if isinstance(method, SdLoraMethod) and found:
        method.begin_training(prepared)
        return found, notes
    if method and inject:
        # What is added to a model without weights has none either.
        with torch.device("meta") if prepared.place == "meta" else nullcontext():
            method.inject(prepared)
    if isinstance(method, SdLoraMethod) and cfg.resume:
        found, more = find_resume_point(run_dir / WARMUP)
        notes = [*notes[:-1], *(f"warm-up: {note}" for note in more)]
    return found, notes


def check_warmup(cfg: RunConfig, warmup_steps: int, total_steps: int) -> None:
    """Raises InputError for a warm-up that the run is too short for, or that moves nothing."""
    if warmup_steps == 1 and lr_at(0, total_steps, cfg) == 0:
        raise InputError(
            "num_warmup_it 0: the learning rate of the only step of this warm-up is 0; raise it, "
            "or set warmup_steps and warmup_ratio to 0"
        )
    if warmup_steps > total_steps:
        raise InputError(
            f"num_warmup_it {warmup_steps - 1}: a warm-up of {warmup_steps} optimizer steps is "
            f"longer than the run of {total_steps}; lower it (HP_WARMUP_IT), or train longer"
        )
