"""The stages of a run: each goes through the loop with its own optimizer, checkpoints and log. A
method with a warm-up chooses by it what the last stage trains; that one ends in exported weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

from ssm_train import distributed, snapshot
from ssm_train.adapters.common import check_dtypes_again
from ssm_train.health.out_of_memory import explain_out_of_memory_in_evaluation
from ssm_train.health.preflight import prove_alive, tell_compiling
from ssm_train.loop import Outcome, Training, TrainState, explain_bad_steps, train
from ssm_train.metrics import LOSSES, Progress
from ssm_train.optim import build_optimizer, describe_rates, same_rate
from ssm_train.peft.coverage import count_parameters
from ssm_train.peft.sd_lora import SdLoraMethod
from ssm_train.plan import memory_of_gpu
from ssm_train.ready import Ready
from ssm_train.record import WARMUP
from ssm_train.record.plot import plot_selection
from ssm_train.record.runlog import RunLog
from ssm_train.record.summary import Result, export_weights, print_summary, write_result
from ssm_train.resume import RunCheckpoints
from ssm_train.scaling import warn_of_parts
from ssm_train.schedule import Schedule
from ssm_train.stop_flag import Interrupted
from ssm_train.watchdog import watch


@dataclass
class Stage:
    """A stage under way."""

    ready: Ready
    schedule: Schedule
    sizes: tuple[int, int]
    """Trained and all parameters."""
    checkpoints: RunCheckpoints
    state: TrainState
    log: RunLog
    trouble: str = ""
    """Where the losses of bad steps come from."""

    def evaluate(self, step: int, split: str = "val") -> dict[str, float]:
        """All ranks. Metrics of a split, which the log gets too. Raises Interrupted, with random
        states as before, where a rank is to stop."""
        evaluation, rng = self.ready.evaluations[split], snapshot.collect_rng()
        try:
            with (
                explain_out_of_memory_in_evaluation(evaluation.batch_size),
                self.ready.engine.whole() as model,
            ):
                values, rows = evaluation.run(model, lambda: bool(self.ready.stop))
        except Interrupted:
            snapshot.restore_rng(rng)
            raise
        self.log.evaluated(step, split, values, rows)
        return values

    def go_back(self) -> TrainState | None:
        """All ranks. To the newest checkpoint, and the log with it; None where there is none."""
        restored = self.checkpoints.go_back()
        if restored is not None:
            self.log.go_back(restored.step, restored.tokens)
        return restored

    def train(self, main_metric: str, least_metric: Mapping[int, float]) -> Outcome:
        """All ranks. Through the loop, to the end of the schedule or until something stops it."""
        ready, cfg = self.ready, self.ready.cfg
        training = Training(
            engine=ready.engine,
            token_losses=ready.subject.adapter.token_losses,
            micro_batches=ready.micro_batches,
            schedule=self.schedule,
            optim=cfg,
            prec=cfg.prec,
            log=self.log.trained,
            evaluate=self.evaluate if "val" in ready.evaluations else None,
            save=None if cfg.no_save else self.checkpoints.save,
            main_metric=main_metric,
            higher_is_better=main_metric not in LOSSES,
            least_metric=dict(least_metric),
            stop=ready.stop,
            cuda_graphs=ready.cuda_graphs,
            max_bad_steps=cfg.max_bad_steps,
            spike_threshold=cfg.spike_threshold,
            spike_rollbacks=cfg.spike_rollbacks,
            go_back=self.go_back,
            say=self.log.bar.say,
            oom=cfg.oom,
        )
        ready.engine.model.train()  # weights from files come in evaluation mode: no recomputation
        try:
            outcome = train(training, self.state)
            if outcome == "bad_loss":
                self.trouble = explain_bad_steps(training, self.state.step - 1)
            self.checkpoints.finish()
        except Exception:  # an interrupt does not wait
            self.checkpoints.wait()
            raise
        finally:
            training.drop_graphs()
        if outcome == "stopped":
            self.checkpoints.check_saved()
        return outcome


@contextmanager
def open_stage(
    ready: Ready, name: str, schedule: Schedule, lines: Sequence[str]
) -> Iterator[Stage]:
    """All ranks. The stage `name` from its start, or from where `ready.found` left it. The warm-up
    is kept in a directory of its own; `lines` are said first."""
    cfg, subject = ready.cfg, ready.subject
    run_dir = ready.run_dir / WARMUP if name == WARMUP else ready.run_dir
    no_decay = subject.prepared.traits.no_decay
    lr_scale = getattr(subject.method, "lr_scale", same_rate)
    sizes = count_parameters(subject.prepared.model)  # while it is whole
    lines = [*lines, *warn_of_engine(ready)]
    ready.engine.prepare(
        subject.prepared.model, lambda model: build_optimizer(model, cfg, no_decay, lr_scale)
    )
    check_dtypes_again(subject.prepared.model)
    checkpoints = RunCheckpoints(
        run_dir, cfg, ready.engine, subject.method,
        global_batch=len(ready.order.micro_batches(0)) * (1 if cfg.packing else cfg.batch_size),
        stage=name,
    )  # fmt: skip
    distributed.seed_everything(cfg.seed + distributed.rank())  # dropout differs between ranks
    state = checkpoints.restore(ready.found) if ready.found else TrainState()
    with ExitStack() as stack:
        bar = Progress(schedule.total_steps, state.step, distributed.is_main())
        checkpoints.say = bar.say
        for line in [*lines, *ready.engine.notes, *describe_rates(ready.engine.optimizer)]:
            bar.say(line)
        stack.enter_context(bar)
        stack.enter_context(tell_compiling(ready.engine.device, bar.say))
        if distributed.is_main():  # rank 0
            run_dir.mkdir(exist_ok=True)
        log = RunLog(
            run_dir, bar, name=ready.run_dir.name + (f" {WARMUP}" if name == WARMUP else ""),
            trackers=cfg.trackers, config=cfg.model_dump(), step=state.step, tokens=state.tokens,
        )  # fmt: skip
        stack.callback(log.close)
        stacks = run_dir / f"stacks-rank{distributed.rank()}.txt"
        stack.enter_context(watch(cfg.watchdog_seconds, stacks, distributed.rank()))
        yield Stage(ready, schedule, sizes, checkpoints, state, log)


def warn_of_engine(ready: Ready) -> list[str]:
    """A line where frozen weights are in parts, though they would fit whole."""
    world = distributed.world_size()
    if ready.subject.method is None or not ready.engine.shards_weights or world == 1:
        return []
    size = {True: 0, False: 0}
    for parameter in ready.subject.prepared.model.parameters():
        size[parameter.requires_grad] += parameter.numel() * parameter.element_size()
    if size[False] > memory_of_gpu() / 2:
        return []
    return [f"warning: {warn_of_parts(ready.engine.name, size[False], size[True], world)}"]


def warm_up(ready: Ready, main_metric: str, lines: Sequence[str]) -> Result | None:
    """All ranks. The first stage, then the choice, after which the model stands at the start of the
    last stage. Returns how it ended where that is too early."""
    method, scaler = ready.subject.method, ready.engine.scaler
    assert isinstance(method, SdLoraMethod)
    fresh_scaler = scaler.state_dict() if scaler else None
    schedule = replace(ready.schedule, total_steps=method.warmup_steps)
    lines = [*lines, f"warm-up of {schedule.total_steps:,} steps"]
    began = time.perf_counter()
    with open_stage(ready, WARMUP, schedule, lines) as stage:
        outcome = stage.train(main_metric, {})
    if outcome != "finished":
        result = Result(
            outcome, ready.run_dir, stage.state.step, main_metric, {}, {}, None,
            *stage.sizes, time.perf_counter() - began, stage=WARMUP,
            skipped_steps=stage.state.skipped_steps, trouble=stage.trouble,
        )  # fmt: skip
        if distributed.is_main():
            write_result(result)
            print_summary(result, stage.log.bar.say)
        return result
    with ready.engine.whole() as whole:
        selection = distributed.gather_objects([method.select(whole)])[0]
    if distributed.is_main():  # rank 0
        selection.write(ready.run_dir, method.record())
        plot_selection(selection, ready.run_dir / "selection.png")
    ready.subject.prepared.model = ready.engine.free()
    if scaler:
        scaler.load_state_dict(fresh_scaler)
    ready.found, ready.notes = None, [str(selection)]
    distributed.seed_everything(ready.cfg.seed)
    method.begin_training(ready.subject.prepared, selection)
    prove_alive(ready, ready.subject.prepared.model)
    return None


def fit(ready: Ready, main_metric: str, lines: Sequence[str]) -> Result:
    """All ranks. Trains, evaluates and exports; `lines` are said first."""
    cfg = ready.cfg
    began = time.perf_counter()
    outcome: Outcome = "stopped"
    test: dict[str, float] = {}
    with open_stage(ready, "train", ready.schedule, lines) as stage:
        state, log = stage.state, stage.log
        after, after_step = state.best, state.best_step
        # Stopped before its first step, a run begins again; in the test, it has a last checkpoint.
        with suppress(Interrupted):
            if "val" in ready.evaluations and cfg.eval_at_start and not state.step:
                stage.evaluate(0)
            reached = stage.train(main_metric, cfg.min_eval_metric_after_epoch)
            after, after_step = state.best, state.best_step
            if reached in ("finished", "low_metric"):
                if not stage.checkpoints.load_best(state):
                    after, after_step = log.values.get("val", {}), state.step
                if "test" in ready.evaluations:
                    test = stage.evaluate(after_step or state.step, "test")
            outcome = reached
        complete = outcome in ("finished", "low_metric")
        seconds = time.perf_counter() - began
    result = Result(
        outcome, ready.run_dir, state.step, main_metric, log.before, after, after_step,
        *stage.sizes, seconds, test,
        log.rates, log.rows.get("test") or log.rows.get("val", []),
        skipped_steps=state.skipped_steps, trouble=stage.trouble,
    )  # fmt: skip
    if complete:
        with ready.engine.for_writing() as model:
            if model is not None and distributed.is_main():
                result.exported = export_weights(
                    ready.run_dir, replace(ready.subject.prepared, model=model),
                    ready.subject.method, base_id=ready.base, revision=cfg.revision,
                )  # fmt: skip
            distributed.barrier()
    if distributed.is_main():  # rank 0
        write_result(result)
        print_summary(result, log.bar.say)
    return result
