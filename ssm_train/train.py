"""Composition root: config -> model -> data -> PEFT -> loop -> what a person takes away.

`python -m ssm_train.train --cfg ...` is what torchrun and `accelerate launch` start.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ssm_train import distributed
from ssm_train.adapters import registry
from ssm_train.adapters.base import Batch, ModelAdapter, ModelSpec, Prepared
from ssm_train.config import RunConfig, describe_overrides, dump_yaml, load_config, run_directory
from ssm_train.data.batches import collate, pack
from ssm_train.data.examples import TokenizedDataset
from ssm_train.data.order import Order, PackedOrder, accumulation_for, build_order
from ssm_train.data.sources import check_data, has_split, load_task_data, training_texts
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError
from ssm_train.evaluate import Evaluation
from ssm_train.generate import Autocast, create_decoder
from ssm_train.loop import Training, TrainState, plan_schedule, train
from ssm_train.metrics import Progress, check_trackers
from ssm_train.optim import build_optimizer
from ssm_train.peft.coverage import measure_coverage
from ssm_train.peft.liveness import check_liveness
from ssm_train.peft.spec import load_peft
from ssm_train.record import MARKER, check_run_directory, create_run_directory
from ssm_train.resume import RunCheckpoints, find_resume_point
from ssm_train.runlog import RunLog
from ssm_train.summary import Result, export_weights, print_summary

STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEBUG_EXAMPLES = {"train": 8, "val": 2, "test": 2}


def run(cfg: RunConfig, provenance: Mapping[str, str], cfg_path: str | Path) -> Result:
    """Trains one config, from its files to an exported adapter or model. All ranks.

    Raises InputError for what the user can mend. Until the model is built and proven alive,
    nothing is written.
    """
    if cfg.debug:
        cfg = cfg.model_copy(update={"num_epochs": 1.0, "max_steps": None})
    run_dir = run_directory(cfg, cfg_path)
    check_run_directory(run_dir, overwrite=cfg.overwrite, resume=cfg.resume)
    check_trackers(cfg.trackers)
    splits = find_splits(cfg)
    check_data(cfg, splits)
    peft = load_peft(cfg.peft, cfg.peft_overrides.given())
    base_id = train_base(cfg)

    accelerator = distributed.build_accelerator(cfg.prec, cfg.device)
    device, rank = accelerator.device, distributed.rank()
    distributed.seed_everything(cfg.seed)
    adapter, prepared, reason = prepare_model(cfg, base_id, str(device), frozen=peft is not None)
    data = {
        split: load_task_data(
            cfg, prepared.tokenizer, split, limit=DEBUG_EXAMPLES[split] if cfg.debug else None
        )
        for split in splits
    }
    found, notes = find_resume_point(run_dir) if cfg.resume else (None, [])
    order = plan_order(cfg, data["train"], found.state["global_batch"] if found else None)

    def micro_batches(step: int) -> list[Batch]:
        return make_batches(data["train"], order, cfg, step)

    method = peft.make() if peft else None
    if method:
        method.inject(prepared)
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
    main_metric = cfg.metric_for_best or (val.main_metric if val else "loss")
    schedule = plan_schedule(cfg, order.steps_per_epoch)

    if distributed.is_main():  # rank 0; from here on the run directory is ours
        create_run_directory(run_dir, dump_yaml(cfg), overwrite=cfg.overwrite)
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
            f"model {reason}",
            f"kernels {', '.join(f'{op}: {name}' for op, name in prepared.kernels.items())}",
            str(measure_coverage(bare)) if method else "full fine-tuning",
            describe_data(data, schedule.total_steps, schedule.steps_per_epoch),
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

        before = evaluate(0) if val and cfg.eval_at_start and not state.step else {}
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
                higher_is_better=main_metric not in ("loss", "perplexity"),
                least_metric=cfg.min_eval_metric_after_epoch,
                stop=stop,
            ),
            state,
        )
        complete = outcome in ("finished", "low_metric")
        if complete:
            checkpoints.load_best(state)
        test = evaluate(state.step, "test") if complete and "test" in evaluations else {}
    result = Result(
        outcome, run_dir, state.step, main_metric, before, state.best, state.best_step, test,
        log.rates, log.rows.get("val", []),
    )  # fmt: skip
    if distributed.is_main():  # rank 0
        if complete:
            result.exported = export_weights(run_dir, prepared, method, base_id=base_id)
        print_summary(result, bare, bar.say)
    distributed.barrier()
    return result


def find_splits(cfg: RunConfig) -> tuple[str, ...]:
    """Of train, val and test, those that this run reads."""
    if cfg.skip_eval:
        return ("train",)
    return ("train", "val", "test") if has_split(cfg, "test") else ("train", "val")


def train_base(cfg: RunConfig) -> str | None:
    """The id or directory of the model. All ranks.

    Where `model` is a run config, its result: trained now unless that was done before.
    """
    if cfg.model is None or Path(cfg.model).suffix not in (".yaml", ".yml"):
        return cfg.model
    base_cfg, provenance = load_config(cfg.model)
    run_dir = run_directory(base_cfg, cfg.model)
    marker = run_dir / MARKER
    up_to_date = marker.is_file() and marker.read_text(encoding="utf-8") == dump_yaml(base_cfg)
    if not (up_to_date and (run_dir / "model" / "config.json").is_file()):
        if base_cfg.peft is not None:
            raise InputError(f"model: {cfg.model} trains an adapter; a base needs peft: null")
        device = cfg.device if provenance["device"] == "default" else base_cfg.device
        base_cfg = base_cfg.model_copy(update={"device": device})
        distributed.barrier()
        fresh = base_cfg.model_copy(update={"overwrite": marker.is_file()})
        outcome = run(fresh, provenance, cfg.model).outcome
        if outcome != "finished":
            raise InputError(f"model: training {cfg.model} ended early ({outcome})")
    return str(run_dir / "model")


def prepare_model(
    cfg: RunConfig, base_id: str | None, device: str, *, frozen: bool
) -> tuple[ModelAdapter, Prepared, str]:
    """The adapter, the model with its tokenizer, and why this adapter.

    `frozen`: the weights stay as they are and are stored in `prec`; else they train, in fp32.
    """
    with TemporaryDirectory() as directory:
        tokenizer = cfg.tokenizer
        if isinstance(tokenizer, dict):
            build_tokenizer(training_texts(cfg), tokenizer).save_pretrained(directory)
            tokenizer = directory
        spec = ModelSpec(
            model=base_id,
            new_model=cfg.new_model,
            tokenizer=tokenizer,
            adapter=cfg.adapter,
            revision=cfg.revision,
            dtype=STORAGE[cfg.prec] if frozen else torch.float32,
            kernels=cfg.kernels,
            gradient_checkpointing=cfg.gradient_checkpointing,
            device=device,
        )
        adapter, reason = registry.resolve(spec)
        if cfg.packing and "packing" not in adapter.traits.supports:
            raise InputError(f"packing: {adapter.name} models cannot be packed; set packing: false")
        prepared = adapter.prepare(spec)
    return adapter, prepared, reason


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
        return [pack(train, row, cfg.tokens_per_batch) for row in rows]
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
    return Evaluation(
        dataset, prepared.tokenizer, adapter.token_losses, adapter.token_logits, batch_size,
        decoder, autocast, distributed.rank(), distributed.world_size(),
        distributed.gather_objects, distributed.reduce_sum,
    )  # fmt: skip


def describe_data(data: Mapping[str, TokenizedDataset], steps: int, steps_per_epoch: int) -> str:
    """One line: examples of each split, what was dropped, steps."""
    counts = ", ".join(f"{len(dataset):,} {split}" for split, dataset in data.items())
    dropped = data["train"].dropped
    too_long = f" ({dropped:,} longer than max_length dropped)" if dropped else ""
    return f"data {counts} examples{too_long}; {steps:,} steps, {steps_per_epoch:,} an epoch"


if __name__ == "__main__":
    from ssm_train.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
