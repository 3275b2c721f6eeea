"""The whole training algorithm on one page: from arithmetic data order to the optimizer's step.

It knows training and nothing of models; file order is time order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from ssm_train import distributed
from ssm_train.adapters.base import Batch, TokenLosses
from ssm_train.best_step import evaluate
from ssm_train.engines.base import Engine
from ssm_train.graphs import GradientGraphs, Gradients
from ssm_train.health.not_finite import find_not_finite
from ssm_train.health.out_of_memory import BatchTooLarge, cut, explain_out_of_memory, halve
from ssm_train.health.spikes import describe, is_spike, remember
from ssm_train.optim import OptimSettings, lr_at
from ssm_train.schedule import Schedule
from ssm_train.stop_flag import StopFlag
from ssm_train.watchdog import beat

VANISHED_LOSS = 1e-6


@dataclass
class TrainState:
    """All that a run remembers besides tensors; JSON in the checkpoint."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # real tokens seen by all processes
    bad_steps: int = 0  # consecutive steps without an update or with a vanished loss
    skipped_steps: int = 0  # updates skipped because the loss or a gradient was not finite
    spikes: int = 0  # losses far above those before them
    recent_losses: list[float] = field(default_factory=list)  # what a spike is measured by
    rollbacks: int = 0  # times that the run went back to a checkpoint
    passed_over: int = 0  # steps' batches that were left out by it
    unevaluated: bool = False  # the step's evaluation was due, and given up to stop
    best_step: int | None = None
    best: dict[str, float] = field(default_factory=dict)  # all metrics of the best step


@dataclass
class Training:
    """What the loop works on. The functions know models, files and terminals; the loop does not."""

    engine: Engine  # prepared
    token_losses: TokenLosses
    micro_batches: Callable[[int], list[Batch]]  # this rank's part of optimizer step k
    schedule: Schedule
    optim: OptimSettings
    prec: distributed.Precision
    log: Callable[[dict[str, float]], None]
    evaluate: Callable[[int], dict[str, float]] | None  # all ranks, may raise Interrupted
    save: Callable[[TrainState], None] | None  # all ranks; None: never
    main_metric: str = "loss"
    higher_is_better: bool = False
    least_metric: dict[int, float] = field(default_factory=dict)  # epoch -> least main metric
    stop: StopFlag | None = None
    cuda_graphs: bool = False
    max_bad_steps: int = 10
    spike_threshold: float = 0.0
    spike_rollbacks: int = 0
    go_back: Callable[[], TrainState | None] = lambda: None  # all ranks; to the newest checkpoint
    say: Callable[[str], None] = print
    oom: Literal["stop", "shrink"] = "stop"
    too_large: float = math.inf  # elements of the smallest batch that memory did not suffice for
    passed_over: int = 0  # as TrainState says

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.engine.model.parameters() if p.requires_grad]
        self.gradients: Gradients = partial(add_gradients, self)
        if self.cuda_graphs:
            self.gradients = GradientGraphs(self.gradients, self.parameters)

    def batches(self, step: int) -> list[Batch]:
        """This rank's part of optimizer step `step`, past those that were left out."""
        return self.micro_batches(step + self.passed_over)

    def forget_gradients(self) -> None:
        """Of a step that begins again, with all memory that it took."""
        self.drop_graphs()
        for parameter in self.parameters:
            parameter.grad = None
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def drop_graphs(self) -> None:
        """Gives back the memory of CUDA graphs, if there are any; later steps record them again."""
        if isinstance(self.gradients, GradientGraphs):
            self.gradients.drop()


Outcome = Literal["finished", "stopped", "bad_loss", "low_metric"]


def train(run: Training, state: TrainState) -> Outcome:
    """Trains from `state.step` to the end of the schedule. All ranks."""
    schedule, clock = run.schedule, time.perf_counter()
    unread: list[Report] = []
    spikes: list[tuple[float, int]] = []  # since the last row of the log
    if run.evaluate and state.unevaluated:  # where it was stopped
        too_low = evaluate(run, state).too_low
        if state.unevaluated:
            return "stopped"
        if run.save:
            run.save(state)
        if too_low:
            return "low_metric"
    while state.step < schedule.total_steps:
        run.passed_over = state.passed_over
        unread.append(train_step(run, state.step))
        state.step += 1
        step = state.step
        beat()
        last = step == schedule.total_steps
        due_log = last or step % schedule.logging_steps == 0
        due_eval = last or step % schedule.eval_steps == 0
        due_save = last or step % schedule.save_steps == 0

        # The status of a step is read one step late, so that the host never waits for the device;
        # only where something is written does it have to be complete.
        stop, spiked, complete = False, False, due_log or due_eval or due_save
        while len(unread) > (0 if complete or stop else 1):
            status = unread.pop(0).read()
            stop |= status.stop
            state.tokens += status.tokens
            state.skipped_steps += status.skipped
            bad = status.skipped or not status.loss > VANISHED_LOSS
            state.bad_steps = state.bad_steps + 1 if bad else 0
            if is_spike(status.loss, state.recent_losses, run.spike_threshold):
                state.spikes += 1
                spikes.append((status.loss, step - len(unread)))
                spiked = True
            remember(status.loss, state.recent_losses)
        if state.bad_steps >= run.max_bad_steps:
            return "bad_loss"
        if spiked and not stop and pass_over(run, state, spikes):
            unread.clear()
            spikes.clear()
            clock = time.perf_counter()
            continue

        if due_log:
            now = time.perf_counter()
            run.log(
                {
                    "step": step,
                    "epoch": step / schedule.steps_per_epoch,
                    "loss": status.loss,
                    "grad_norm": status.grad_norm,
                    "learning_rate": lr_at(step - 1, schedule.decay_steps, run.optim),
                    "tokens": state.tokens,
                    "seconds": now - clock,
                    "skipped_steps": state.skipped_steps,
                    "spikes": state.spikes,
                }
            )
            clock = now
            if spikes:
                run.say(describe(spikes, state.recent_losses))
                spikes.clear()

        too_low = False
        if run.evaluate and due_eval:  # once in a while, all ranks
            started = time.perf_counter()
            best, too_low = evaluate(run, state, stop)
            due_save |= best
            stop |= state.unevaluated
            clock += time.perf_counter() - started
        if run.save and (due_save or stop):  # once in a while, all ranks
            started = time.perf_counter()
            run.save(state)
            clock += time.perf_counter() - started
        if stop and (state.unevaluated or not last):
            return "stopped"
        if too_low:
            return "low_metric"
    return "finished"


def pass_over(run: Training, state: TrainState, spikes: list[tuple[float, int]]) -> bool:
    """All ranks. Puts the run back to its newest checkpoint, from where it goes on with batches
    that it has not seen; False where there is none, or after `spike_rollbacks` times."""
    if state.rollbacks >= run.spike_rollbacks or (restored := run.go_back()) is None:
        return False
    restored.passed_over = state.passed_over + state.step - restored.step
    restored.rollbacks, restored.spikes = state.rollbacks + 1, state.spikes
    run.say(
        f"{describe(spikes, state.recent_losses)}: back to step {restored.step}, and past the "
        f"batches of {state.step - restored.step} steps ({restored.rollbacks} of "
        f"{run.spike_rollbacks} times)"
    )
    vars(state).update(vars(restored))
    if run.save:
        run.save(state)  # else a kill would bring them back
    return True


@dataclass
class Status:
    """One optimizer step, summed over all processes."""

    stop: bool
    skipped: bool
    loss: float  # mean over the step's supervised tokens, nats
    tokens: int
    grad_norm: float


@dataclass
class Report:
    """A step's status on its way from the device."""

    values: Callable[[], list[float]]

    def read(self) -> Status:
        stop, not_finite, loss_sum, targets, tokens, norm = self.values()
        world = distributed.world_size()
        return Status(stop > 0, not_finite > 0, loss_sum / targets, int(tokens), norm / world)


def train_step(run: Training, step: int) -> Report:
    """One optimizer step: all micro-batches of all ranks count as one batch.

    The gradient is that of (sum of the losses) / (supervised tokens), both over the whole step,
    so that accumulation, the number of processes and padding change nothing.
    """
    engine, device = run.engine, run.engine.device
    batches = run.batches(step)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["lr_scale"] * lr_at(step, run.schedule.decay_steps, run.optim)

    counts = on_device(
        device, sum(b.num_targets for b in batches), sum(b.num_tokens for b in batches)
    )
    counts = distributed.reduce_sum(counts)  # all ranks; stays on the device
    # Engines average gradients over the ranks; `world_size` makes that a sum.
    scale = (distributed.world_size() / counts[0]).float()

    loss_sum = add_step_gradients(run, batches, scale)
    # CUDA graphs add to the same memory.
    norm = engine.step(run.optim.max_grad_norm or math.inf, keep_gradients=run.cuda_graphs)
    not_finite = ~torch.isfinite(norm)

    stop = on_device(device, float(bool(run.stop)))[0]
    world = distributed.world_size()
    return Report(
        distributed.reduce_sum_later(
            torch.stack([stop, not_finite.double(), loss_sum, *(counts / world), norm.double()])
        )
    )


def add_step_gradients(run: Training, batches: list[Batch], scale: torch.Tensor) -> torch.Tensor:
    """The loss of all micro-batches, summed, after adding `scale` times its gradient. Where memory
    does not suffice for one, with `oom: shrink` the step begins again with smaller ones."""
    device = run.engine.device
    while True:
        parts = [part.to(device) for batch in batches for part in cut(batch, run.too_large)]
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        try:
            for i, batch in enumerate(parts):
                with (
                    explain_out_of_memory(batch),
                    run.engine.accumulate(last=i == len(parts) - 1),
                ):
                    loss_sum += run.gradients(batch, scale)
            return loss_sum
        except BatchTooLarge as error:
            if run.oom == "stop" or not halve(error.batch.to("cpu")):
                raise
            run.too_large = error.batch.input_ids.numel()
        run.forget_gradients()
        run.say(f"out of memory: batches of {run.too_large:,} tokens and more are halved")


def add_gradients(run: Training, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
    """The loss of a micro-batch, summed, after adding `scale` times its gradient."""
    loss = loss_of(run, batch)
    # A loss that is not finite makes all gradients so, which skips the step on all ranks.
    run.engine.backward(loss * (scale + 0 * loss.detach()))
    return loss.detach()


def loss_of(run: Training, batch: Batch) -> torch.Tensor:
    """Of a micro-batch, summed; in the run's precision."""
    with distributed.autocast(run.prec, run.engine.device):
        return run.token_losses(run.engine.model, batch).loss


def explain_bad_steps(run: Training, step: int) -> str:
    """All ranks. Where in optimizer step `step`, the last of too many bad ones, a value first is
    not finite."""
    batches = (batch.to(run.engine.device) for batch in run.batches(step))
    return find_not_finite(run.engine.model, batches, partial(loss_of, run))


def on_device(device: torch.device, *values: float) -> torch.Tensor:
    """[n] fp64. Filled there: a copy from the host would wait for the device."""
    options: dict[str, Any] = {"dtype": torch.float64, "device": device}
    return torch.stack([torch.full((), value, **options) for value in values])
