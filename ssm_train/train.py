"""Composition root: config -> model -> data -> PEFT -> loop -> what a person takes away.

`python -m ssm_train.train --cfg ...` is what torchrun and `accelerate launch` start.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

from ssm_train import distributed
from ssm_train.adapters.base import Batch
from ssm_train.assemble import (
    Subject,
    base_id,
    build_evaluation,
    check_same_run,
    choose_main_metric,
    debug_config,
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
from ssm_train.config import RunConfig, describe_overrides, dump_yaml, run_directory
from ssm_train.data.sources import check_data
from ssm_train.data.tokens import TokenizedDataset
from ssm_train.errors import InputError
from ssm_train.lock import own
from ssm_train.loop import Training, TrainState, plan_schedule, train
from ssm_train.metrics import LOSSES, Progress, check_trackers
from ssm_train.optim import build_optimizer
from ssm_train.peft.coverage import count_parameters, measure_coverage
from ssm_train.peft.liveness import check_liveness
from ssm_train.peft.spec import load_peft
from ssm_train.record import check_run_directory, create_run_directory
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
    with own(run_dir) if cfg.lock and main else nullcontext():
        return run_in(run_dir, cfg, provenance, given)


def run_in(
    run_dir: Path, cfg: RunConfig, provenance: Mapping[str, str], given: Subject | None = None
) -> Result:
    """`run`, once the directory is ours."""
    check_run_directory(run_dir, overwrite=cfg.overwrite, resume=cfg.resume)
    check_trackers(cfg.trackers)
    splits = find_splits(cfg)
    changes = check_same_run(cfg, run_dir) if cfg.resume else []
    main_metric = choose_main_metric(cfg, check_data(cfg, splits))
    peft = load_peft(cfg.peft, cfg.peft_overrides.given())
    if (unfinished := train_base(cfg)) is not None:
        return unfinished

    accelerator = distributed.build_accelerator(cfg.prec, cfg.device)
    device, rank = accelerator.device, distributed.rank()
    distributed.seed_everything(cfg.seed)
    base = base_id(cfg, run_dir)
    if cfg.resume and cfg.model is not None:
        check_base(run_dir, str(base))
    subject = given or prepare_model(cfg, base, str(device), frozen=peft is not None)
    adapter, prepared = subject.adapter, subject.prepared
    data = {split: load_examples(cfg, prepared.tokenizer, split) for split in splits}
    found, notes = find_resume_point(run_dir) if cfg.resume else (None, [])
    order = plan_order(cfg, data["train"], found.state["global_batch"] if found else None)

    def micro_batches(step: int) -> list[Batch]:
        return make_batches(data["train"], order, cfg, step)

    method = subject.method
    if peft and not given:
        method = peft.make()
        method.inject(prepared)
    if method:
        method.calibrate(prepared, micro_batches(0), adapter.token_losses)
    bare = prepared.model
    autocast = partial(distributed.autocast, cfg.prec, device)
    with autocast():
        check_liveness(
            bare,
            micro_batches(0)[0].to(device),
            adapter.token_losses,
            reduce_max=distributed.reduce_max,
        )
    optimizer = build_optimizer(bare, cfg, prepared.traits.no_decay)
    evaluations = {
        split: build_evaluation(cfg, adapter, data[split], prepared, autocast)
        for split in splits
        if split != "train"
    }
    val = evaluations.get("val")
    schedule = plan_schedule(cfg, order.steps_per_epoch)

    if distributed.is_main():  # rank 0; from here on the run directory is ours
        create_run_directory(run_dir, dump_yaml(cfg), overwrite=cfg.overwrite)
        if cfg.model is not None:
            record_base(run_dir, str(base))
        if isinstance(cfg.tokenizer, dict):  # built from the training data
            prepared.tokenizer.save_pretrained(run_dir / "tokenizer")
        if method and base is None:
            base = str(keep_new_base(cfg, run_dir))
    distributed.barrier()
    model, prepared_optimizer = accelerator.prepare(bare, optimizer)
    checkpoints = RunCheckpoints(
        run_dir, cfg.save_total_limit, bare, optimizer, accelerator.scaler, method,
        global_batch=len(order.micro_batches(0)) * (1 if cfg.packing else cfg.batch_size),
    )  # fmt: skip
    distributed.seed_everything(cfg.seed + rank)  # dropout differs between ranks
    state = checkpoints.restore(found) if found else TrainState()

    with ExitStack() as stack:
        stop = stack.enter_context(distributed.StopFlag())
        bar = Progress(schedule.total_steps, state.step, distributed.is_main())
        for line in [
            f"run {run_dir}",
            *(f"  {line}" for line in describe_overrides(cfg, provenance)),
            f"model {subject.reason}",
            f"kernels {', '.join(f'{op}: {name}' for op, name in prepared.kernels.items())}",
            str(measure_coverage(bare)) if method else "full fine-tuning",
            describe_data(data, schedule.total_steps, schedule.steps_per_epoch),
            *changes,
            *notes,
        ]:
            bar.say(line)
        stack.enter_context(bar)
        log = RunLog(
            run_dir, bar, trackers=cfg.trackers, config=cfg.model_dump(),
            step=state.step, tokens=state.tokens,
        )  # fmt: skip
        stack.callback(log.close)

        def evaluate(step: int, split: str = "val") -> dict[str, float]:  # all ranks
            values, rows = evaluations[split].run(bare)
            log.evaluated(step, split, values, rows)
            return values

        began = time.perf_counter()
        if val and cfg.eval_at_start and not state.step:
            evaluate(0)
        outcome = train(
            Training(
                accelerator=accelerator,
                model=model,
                optimizer=prepared_optimizer,
                token_losses=adapter.token_losses,
                micro_batches=micro_batches,
                schedule=schedule,
                optim=cfg,
                prec=cfg.prec,
                log=log.trained,
                evaluate=evaluate if val else None,
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
        test = (
            evaluate(after_step or state.step, "test") if complete and "test" in evaluations else {}
        )
        seconds = time.perf_counter() - began
    result = Result(
        outcome, run_dir, state.step, main_metric, log.before, after, after_step,
        *count_parameters(bare), seconds, test,
        log.rates, log.rows.get("test") or log.rows.get("val", []),
    )  # fmt: skip
    if distributed.is_main():  # rank 0
        if complete:
            result.exported = export_weights(
                run_dir, prepared, method, base_id=base, revision=cfg.revision
            )
        write_result(result)
        print_summary(result, bar.say)
    distributed.barrier()
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


def describe_data(data: Mapping[str, TokenizedDataset], steps: int, steps_per_epoch: int) -> str:
    """One line: examples of each split, what was dropped, steps."""
    counts = ", ".join(f"{len(dataset):,} {split}" for split, dataset in data.items())
    dropped = data["train"].dropped
    too_long = f" ({dropped:,} longer than max_length dropped)" if dropped else ""
    return f"data {counts} examples{too_long}; {steps:,} steps, {steps_per_epoch:,} an epoch"


if __name__ == "__main__":
    from ssm_train.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
