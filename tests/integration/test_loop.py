"""The loop on a toy model: what a step's gradient is, what ends a run, what a skip leaves alone."""

import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssm_train import distributed
from ssm_train.adapters.base import Batch, LossSum
from ssm_train.engines.replicated import Replicated
from ssm_train.loop import Training, TrainState, train
from ssm_train.optim import OptimSettings, build_optimizer
from ssm_train.schedule import LoopSettings, Schedule, plan_schedule
from ssm_train.stop_flag import StopFlag

VOCAB = 13
DOCUMENTS = [torch.arange(n) * (n + 3) % VOCAB for n in (9, 2, 5, 14, 3, 7, 11, 4)]


def toy_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB, 6), nn.Tanh(), nn.Linear(6, VOCAB))


def pad(documents: list[torch.Tensor]) -> Batch:
    """Right-padded rows; every token but the first two of a document is supervised."""
    length = max(map(len, documents))
    ids, mask = torch.zeros(2, len(documents), length, dtype=torch.int64)
    positions, targets = [], []
    for row, tokens in enumerate(documents):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        for t in range(1, len(tokens) - 1):
            positions.append(row * length + t)
            targets.append(int(tokens[t + 1]))
    return Batch(
        input_ids=ids,
        target_positions=torch.tensor(positions, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        sequence_ids=torch.arange(len(documents))[:, None].expand_as(ids),
        position_ids=torch.arange(length).expand_as(ids),
        attention_mask=mask.bool(),
        num_tokens=int(mask.sum()),
    )


def token_losses(model: nn.Module, batch: Batch) -> LossSum:
    logits = model(batch.input_ids).flatten(0, 1)[batch.target_positions]
    return LossSum(F.cross_entropy(logits, batch.targets, reduction="sum"), batch.num_targets)


def training(per_micro_batch: int, accumulation: int, total_steps: int = 2, **changes) -> Training:
    """The same 4 documents a step, however they are cut into micro-batches and ranks."""
    engine = Replicated(distributed.build_accelerator("fp32", "cpu"))
    rank, world = distributed.rank(), distributed.world_size()
    assert per_micro_batch * accumulation * world == 4

    def micro_batches(step: int) -> list[Batch]:
        documents = [DOCUMENTS[(4 * step + i) % len(DOCUMENTS)] for i in range(4)]
        mine = documents[rank::world]
        return [pad(mine[i : i + per_micro_batch]) for i in range(0, len(mine), per_micro_batch)]

    settings = OptimSettings(learning_rate=0.01, lr_scheduler_type="constant", weight_decay=0.1)
    engine.prepare(toy_model(), lambda model: build_optimizer(model, settings, ()))
    parts = {
        "engine": engine,
        "token_losses": token_losses,
        "micro_batches": micro_batches,
        "schedule": Schedule(total_steps, total_steps, 10, 1, 1, 1),
        "optim": settings,
        "prec": "fp32",
        "log": lambda row: None,
        "evaluate": None,
        "save": None,
    }
    return Training(**(parts | changes))


def recorded_gradients(run: Training) -> list[torch.Tensor]:
    """Trains, keeping what the optimizer saw at its first step."""
    seen: list[torch.Tensor] = []

    def record(*_):
        if not seen:
            seen.extend(p.grad.clone() for p in run.parameters)

    run.engine.own_optimizer.register_step_pre_hook(record)
    assert train(run, TrainState()) == "finished"
    return seen


def expected_gradients(max_norm: float = 1.0) -> list[torch.Tensor]:
    """Mean over all supervised tokens of the step, by hand, in one batch, clipped."""
    model = toy_model()
    out = token_losses(model, pad(DOCUMENTS[:4]))
    (out.loss / out.num_targets).backward()
    gradients = [p.grad for p in model.parameters()]
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    return [g * min(1.0, max_norm / norm) for g in gradients]


@pytest.mark.parametrize(("per_micro_batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_accumulation_does_not_change_the_gradient(per_micro_batch, accumulation):
    seen = recorded_gradients(training(per_micro_batch, accumulation))
    for ours, expected in zip(seen, expected_gradients(), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def two_process_worker(rank: int, port: int, directory: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        for name, cut in {"one": (2, 1), "accumulated": (1, 2)}.items():
            seen = recorded_gradients(training(*cut))
            torch.save(seen, f"{directory}/{name}-{rank}.pt")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_two_processes_do_not_change_the_gradient(tmp_path, free_port):
    torch.multiprocessing.spawn(two_process_worker, (free_port, str(tmp_path)), nprocs=2)
    for name in ("one", "accumulated"):
        for rank in (0, 1):
            seen = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            for ours, expected in zip(seen, expected_gradients(), strict=True):
                torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_a_step_with_a_nan_changes_nothing_and_is_counted():
    snapshots = []

    def nan_at_second_step(model, batch):
        out = token_losses(model, batch)
        snapshots.append([p.detach().clone() for p in model.parameters()])
        return LossSum(out.loss * (math.nan if len(snapshots) == 2 else 1), out.num_targets)

    run = training(4, 1, total_steps=4, token_losses=nan_at_second_step)
    state = TrainState()
    assert train(run, state) == "finished"
    assert state.skipped_steps == 1 and state.step == 4
    for before, after in zip(snapshots[1], snapshots[2], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(snapshots[2][0], snapshots[3][0])


def test_ten_bad_losses_in_a_row_end_the_run():
    def never_finite(model, batch):
        out = token_losses(model, batch)
        return LossSum(out.loss * math.nan, out.num_targets)

    run = training(4, 1, total_steps=50, token_losses=never_finite)
    state = TrainState()
    assert train(run, state) == "bad_loss"
    assert state.step == 10 and state.skipped_steps == 10


def test_a_spike_is_counted_and_said_with_the_log():
    losses = []

    def one_wild_step(model, batch):
        out = token_losses(model, batch)
        losses.append(float(out.loss.detach()) / out.num_targets)
        return LossSum(out.loss * (30 if len(losses) == 50 else 1), out.num_targets)

    rows, said = [], []
    run = training(
        4, 1, total_steps=60, token_losses=one_wild_step, log=rows.append, say=said.append,
        schedule=Schedule(60, 60, 10, 20, 100, 100), spike_threshold=20.0,
    )  # fmt: skip
    state = TrainState()
    assert train(run, state) == "finished"
    assert state.spikes == 1 and [row["spikes"] for row in rows] == [0, 0, 1]
    assert len(said) == 1 and f"a loss spike: {30 * losses[49]:.4g} in step 50, where" in said[0]
    assert len(state.recent_losses) == 60


def test_a_stop_request_saves_and_stops():
    saved = []
    with StopFlag() as stop:

        def log(row):
            if row["step"] == 3:
                os.kill(os.getpid(), signal.SIGUSR1)

        run = training(
            4, 1, total_steps=9, log=log, stop=stop, save=lambda state: saved.append(state.step),
            schedule=Schedule(9, 9, 10, 1, 100, 100),
        )  # fmt: skip
        assert train(run, TrainState()) == "stopped"
    assert saved == [4]


def test_the_best_step_is_remembered_and_saved():
    accuracy = {1: 0.3, 2: 0.8, 3: 0.5}
    saved = []
    state = TrainState()
    run = training(
        4, 1, total_steps=3, main_metric="accuracy", higher_is_better=True,
        evaluate=lambda step: {"accuracy": accuracy[step]},
        save=lambda state: saved.append(state.step),
        schedule=Schedule(3, 3, 10, 1, 1, 100),
    )  # fmt: skip
    assert train(run, state) == "finished"
    assert (state.best_step, state.best) == (2, {"accuracy": 0.8})
    assert saved == [1, 2, 3]


def test_a_metric_below_its_least_value_stops_the_run():
    run = training(
        4, 1, total_steps=40, main_metric="accuracy", higher_is_better=True,
        evaluate=lambda step: {"accuracy": 0.4}, least_metric={1: 0.3, 2: 0.5},
    )  # fmt: skip
    state = TrainState()
    assert train(run, state) == "low_metric"
    assert state.step == 20  # steps_per_epoch is 10


@pytest.mark.parametrize(
    ("settings", "steps_per_epoch", "expected"),
    [
        ({"num_epochs": 2}, 100, (200, 50, 100, 100)),
        ({"num_epochs": 0.5}, 7, (3, 7, 7, 7)),
        ({"num_epochs": 0.01}, 7, (1, 7, 7, 7)),
        ({"max_steps": 5, "eval_steps": 2}, 7, (5, 7, 2, 2)),
        ({"num_epochs": 3, "eval_epochs": 0.5, "save_steps": 11}, 20, (60, 20, 10, 11)),
    ],
)
def test_epochs_become_steps(settings, steps_per_epoch, expected):
    plan = plan_schedule(LoopSettings(**settings), steps_per_epoch)
    assert (plan.total_steps, plan.logging_steps, plan.eval_steps, plan.save_steps) == expected
