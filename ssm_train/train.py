"""Composition root: config -> model -> data -> PEFT -> loop -> what a person takes away.

`python -m ssm_train.train --cfg ...` is what torchrun and `accelerate launch` start.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from ssm_train import distributed
from ssm_train.adapters.base import Batch, LossSum
from ssm_train.assemble import (
    Subject,
    base_id,
    build_evaluation,
    check_same_run,
    choose_main_metric,
    debug_config,
    describe_measures,
    find_splits,
    keep_new_base,
    load_examples,
    make_batches,
    plan_order,
    prepare_model,
)
from ssm_train.bases import (
    base_run,
    check_base,
    find_base,
    load_base_config,
    own_when_free,
    record_base,
)
from ssm_train.checkpoint import Checkpoint
from ssm_train.config import RunConfig, describe_overrides, dump_yaml, run_directory
from ssm_train.data.batches import collate
from ssm_train.data.order import Order
from ssm_train.data.sources import check_data
from ssm_train.data.tokens import TokenizedDataset
from ssm_train.errors import InputError
from ssm_train.evaluate import Evaluation
from ssm_train.lock import check_free, own
from ssm_train.loop import Schedule, Training, TrainState, plan_schedule, train
from ssm_train.metrics import LOSSES, Progress, check_trackers
from ssm_train.optim import build_optimizer, describe_rates, same_rate
from ssm_train.peft.coverage import count_parameters, measure_coverage
from ssm_train.peft.liveness import check_liveness
from ssm_train.peft.spec import PeftSpec, load_peft
from ssm_train.record import (
    MARKER,
    check_peft,
    check_run_directory,
    create_run_directory,
    record_peft,
)
from ssm_train.resume import RunCheckpoints, find_resume_point
from ssm_train.runlog import RunLog
from ssm_train.summary import Result, export_weights, print_summary, write_result


def run(
    cfg: RunConfig,
    provenance: Mapping[str, str],
    cfg_path: str | Path,
    *,
    run_dir: Path | None = None,
    given: Subject | None = None,
) -> Result:
    """Trains one config, from its files to an exported adapter or model. All ranks.

    `run_dir`: instead of the config's; `given`: a model that the caller made. Raises InputError
    for what the user can mend. Until the model is built and proven alive, nothing is written.
    """
    if cfg.debug:
        cfg = debug_config(cfg)
    run_dir = run_dir or run_directory(cfg, cfg_path)
    main = os.environ.get("RANK", "0") == "0"  # asked before the processes know each other
    if main and not cfg.lock:
        check_free(run_dir)
    with own(run_dir) if cfg.lock and main else nullcontext():
        return run_in(run_dir, cfg, provenance, given)


def run_in(
    run_dir: Path, cfg: RunConfig, provenance: Mapping[str, str], given: Subject | None = None
) -> Result:
    """`run`, once the directory is ours."""
    first = cfg.resume and not (run_dir / MARKER).exists()  # the same command the first time
    cfg = cfg.model_copy(update={"resume": cfg.resume and not first})
    check_run_directory(run_dir, overwrite=cfg.overwrite, resume=cfg.resume)
    check_trackers(cfg.trackers)
    splits = find_splits(cfg)
    changes = check_same_run(cfg, run_dir) if cfg.resume else []
    changes += ["--resume: no run is there yet, so this one begins"] if first else []
    task = check_data(cfg, splits)
    main_metric = choose_main_metric(cfg, task)
    peft = load_peft(cfg.peft, cfg.peft_overrides.given(), provenance)
    if cfg.resume and peft:
        check_peft(run_dir, peft.dump())
    if (unfinished := train_base(cfg)) is not None:
        return unfinished
    ready = get_ready(run_dir, cfg, splits, peft, given)
    claim_directory(ready, peft)
    lines = [*describe_start(ready, provenance), describe_measures(cfg, task, main_metric)]
    result = fit(ready, main_metric, [*lines, *changes, *ready.notes])
    distributed.barrier()
    return result


@dataclass
class Ready:
    """A run that may begin: its parts are built, its tensors are alive, nothing is written."""

    run_dir: Path
    cfg: RunConfig
    accelerator: Any
    subject: Subject
    base: str | None  # id of the model before training; None: new, and not kept yet
    data: Mapping[str, TokenizedDataset]  # by split
    order: Order
    evaluations: Mapping[str, Evaluation]  # by split
    found: Checkpoint | None  # where a resumed run goes on
    notes: list[str]

    @property
    def schedule(self) -> Schedule:
        return plan_schedule(self.cfg, self.order.steps_per_epoch)

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's part of optimizer step `step`."""
        return make_batches(self.data["train"], self.order, self.cfg, step)

    def examples(self) -> Iterator[Batch]:
        """The training examples in the order of training, one a batch; on every rank the same."""
        for step in count():
            for row in self.order.micro_batches(step):
                for i in range(len(row)):
                    yield collate(self.data["train"], row[i : i + 1])


def get_ready(
    run_dir: Path,
    cfg: RunConfig,
    splits: Sequence[str],
    peft: PeftSpec | None,
    given: Subject | None,
) -> Ready:
    """All ranks. Model, data, PEFT and the proof that every trainable tensor is alive."""
    accelerator = distributed.build_accelerator(cfg.prec, cfg.device)
    device = accelerator.device
    distributed.seed_everything(cfg.seed)
    base = base_id(cfg, run_dir)
    if cfg.resume and cfg.model is not None:
        check_base(run_dir, str(base))
    subject = given or prepare_model(cfg, base, str(device), frozen=peft is not None)
    data = {split: load_examples(cfg, subject.prepared.tokenizer, split) for split in splits}
    found, notes = find_resume_point(run_dir) if cfg.resume else (None, [])
    order = plan_order(cfg, data["train"], found.state["global_batch"] if found else None)
    ready = Ready(run_dir, cfg, accelerator, subject, base, data, order, {}, found, notes)

    if peft and not given:
        subject.method = peft.make()
        subject.method.inject(subject.prepared)
    autocast = partial(distributed.autocast, cfg.prec, device)

    def token_losses(model: nn.Module, batch: Batch) -> LossSum:
        with autocast():
            return subject.adapter.token_losses(model, batch)

    if subject.method and not found:  # a resumed run takes its checkpoint's
        subject.method.calibrate(subject.prepared, ready.examples(), token_losses)
    check_liveness(
        subject.prepared.model,
        ready.micro_batches(0)[0].to(device),
        token_losses,
        reduce_max=distributed.reduce_max,
    )
    ready.evaluations = {
        split: build_evaluation(cfg, subject.adapter, data[split], subject.prepared, autocast)
        for split in splits
        if split != "train"
    }
    return ready


def claim_directory(ready: Ready, peft: PeftSpec | None) -> None:
    """All ranks. Rank 0 makes the run directory; what can be mended was found before."""
    run_dir, cfg = ready.run_dir, ready.cfg
    if distributed.is_main():  # rank 0
        new = not (cfg.resume or cfg.overwrite)
        create_run_directory(run_dir, dump_yaml(cfg), overwrite=cfg.overwrite, new=new)
        if peft:
            record_peft(run_dir, peft.dump())
        if cfg.model is not None:
            record_base(run_dir, str(ready.base))
        if isinstance(cfg.tokenizer, dict):  # built from the training data
            ready.subject.prepared.tokenizer.save_pretrained(run_dir / "tokenizer")
        if ready.subject.method and ready.base is None:
            ready.base = str(keep_new_base(cfg, run_dir))
    distributed.barrier()


def fit(ready: Ready, main_metric: str, lines: Sequence[str]) -> Result:
    """All ranks. Trains, evaluates and exports; `lines` are said first."""
    cfg, subject, schedule = ready.cfg, ready.subject, ready.schedule
    bare = subject.prepared.model
    lr_scale = getattr(subject.method, "lr_scale", same_rate)
    optimizer = build_optimizer(bare, cfg, subject.prepared.traits.no_decay, lr_scale)
    model, prepared_optimizer = ready.accelerator.prepare(bare, optimizer)
    checkpoints = RunCheckpoints(
        ready.run_dir, cfg.save_total_limit, bare, optimizer, ready.accelerator.scaler,
        subject.method,
        global_batch=len(ready.order.micro_batches(0)) * (1 if cfg.packing else cfg.batch_size),
    )  # fmt: skip
    distributed.seed_everything(cfg.seed + distributed.rank())  # dropout differs between ranks
    state = checkpoints.restore(ready.found) if ready.found else TrainState()

    with ExitStack() as stack:
        stop = stack.enter_context(distributed.StopFlag())
        bar = Progress(schedule.total_steps, state.step, distributed.is_main())
        for line in [*lines, *describe_rates(optimizer)]:
            bar.say(line)
        stack.enter_context(bar)
        log = RunLog(
            ready.run_dir, bar, trackers=cfg.trackers, config=cfg.model_dump(),
            step=state.step, tokens=state.tokens,
        )  # fmt: skip
        stack.callback(log.close)

        def evaluate(step: int, split: str = "val") -> dict[str, float]:  # all ranks
            values, rows = ready.evaluations[split].run(bare)
            log.evaluated(step, split, values, rows)
            return values

        began = time.perf_counter()
        if "val" in ready.evaluations and cfg.eval_at_start and not state.step:
            evaluate(0)
        outcome = train(
            Training(
                accelerator=ready.accelerator,
                model=model,
                optimizer=prepared_optimizer,
                token_losses=subject.adapter.token_losses,
                micro_batches=ready.micro_batches,
                schedule=schedule,
                optim=cfg,
                prec=cfg.prec,
                log=log.trained,
                evaluate=evaluate if "val" in ready.evaluations else None,
                save=None if cfg.no_save else checkpoints.save,
                main_metric=main_metric,
                higher_is_better=main_metric not in LOSSES,
                least_metric=cfg.min_eval_metric_after_epoch,
                stop=stop,
            ),
            state,
        )
        complete = outcome in ("finished", "low_metric")
        after, after_step = state.best, state.best_step
        if complete and not checkpoints.load_best(state):
            after, after_step = log.values.get("val", {}), state.step
        test: dict[str, float] = {}
        if complete and "test" in ready.evaluations:
            test = evaluate(after_step or state.step, "test")
        seconds = time.perf_counter() - began
    result = Result(
        outcome, ready.run_dir, state.step, main_metric, log.before, after, after_step,
        *count_parameters(bare), seconds, test,
        log.rates, log.rows.get("test") or log.rows.get("val", []),
    )  # fmt: skip
    if distributed.is_main():  # rank 0
        if complete:
            result.exported = export_weights(
                ready.run_dir, subject.prepared, subject.method,
                base_id=ready.base, revision=cfg.revision,
            )  # fmt: skip
        write_result(result)
        print_summary(result, bar.say)
    return result


def train_base(cfg: RunConfig) -> Result | None:
    """Where `model` is a run config, trains it, unless that was done before. All ranks.

    Returns how it ended where that is too early; a stopped one goes on the next time. Raises
    InputError where another base is there.
    """
    run_dir = base_run(cfg)
    if run_dir is None:
        return None
    assert cfg.model is not None
    base_cfg, provenance = load_base_config(cfg.model)
    if base_cfg.peft is not None:
        raise InputError(f"model: {cfg.model} trains an adapter; a base needs peft: null")
    if provenance["device"] == "default":
        base_cfg = base_cfg.model_copy(update={"device": cfg.device})
    if base_cfg.debug:  # as its record says
        base_cfg = debug_config(base_cfg)
    if os.environ.get("WORLD_SIZE", "1") != "1":  # so that all ranks wait for rank 0
        distributed.build_accelerator(cfg.prec, cfg.device)
    if find_base(run_dir, base_cfg, cfg.model) == "done":
        return None
    with own_when_free(run_dir):
        found = find_base(run_dir, base_cfg, cfg.model)  # another process may have made it
        if found == "done":
            return None
        launch = {"resume": found == "begun", "overwrite": found == "none", "lock": False}
        result = run(base_cfg.model_copy(update=launch), provenance, cfg.model)
    return None if result.outcome == "finished" else result


def describe_start(ready: Ready, provenance: Mapping[str, str]) -> list[str]:
    """What a run says first: values that are no defaults, processes, model, kernels, PEFT, data,
    steps."""
    prepared, schedule, data = ready.subject.prepared, ready.schedule, ready.data
    world, device = distributed.world_size(), ready.accelerator.device
    processes = f"{world} processes on {device.type}" if world > 1 else f"1 process on {device}"
    counts = ", ".join(f"{len(dataset):,} {split}" for split, dataset in data.items())
    dropped = data["train"].dropped
    too_long = f" ({dropped:,} longer than max_length dropped)" if dropped else ""
    return [
        f"run {ready.run_dir}",
        *(f"  {line}" for line in describe_overrides(ready.cfg, provenance)),
        processes,
        f"model {ready.subject.reason}",
        f"kernels {', '.join(f'{op}: {name}' for op, name in prepared.kernels.items())}",
        str(measure_coverage(prepared.model)) if ready.subject.method else "full fine-tuning",
        f"data {counts} examples{too_long}; {schedule.total_steps:,} steps, "
        f"{schedule.steps_per_epoch:,} an epoch",
    ]


if __name__ == "__main__":
    from ssm_train.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
