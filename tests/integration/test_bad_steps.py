"""What goes wrong in a step: NaN, too little memory, trackers that fail, a clock that jumps."""

import json
import math
import os
import shutil
import time

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tiny_runs import LORA, assert_same_run, metrics, train, write_config

from ssm_train import loop, ready
from ssm_train.adapters.gla_mixer import GatedMLP
from ssm_train.adapters.mamba import MambaAdapter
from ssm_train.checkpoint import load_checkpoint
from ssm_train.engines.replicated import Replicated
from ssm_train.errors import InputError
from ssm_train.loop import Training
from ssm_train.record.runlog import RunLog, observed
from ssm_train.resume import find_resume_point

CALM = LORA | {"lora_dropout": 0.0}
MLP = "base_model.model.model.layers.1.mlp"
PACKED = {"packing": True, "batch_size": None, "tokens_per_batch": 64}

pytestmark = pytest.mark.usefixtures("no_plot")


def spoil(monkeypatch, where: str, value: float, first: int, last: int) -> None:
    """In steps `first` to `last` (from 1) the loss, a gradient, or the output of the second layer's
    MLP has such a value. The step is seen by whom its batches are made for."""
    now = []
    original = ready.make_batches
    monkeypatch.setattr(
        ready, "make_batches", lambda *given: now.append(given[-1] + 1) or original(*given)
    )

    def bad() -> bool:
        return first <= now[-1] <= last and len(now) > 1  # the preflight makes the first ones

    if where == "output":
        forward = GatedMLP.forward

        def spoilt(self, x, **options):
            y = forward(self, x, **options)
            return y + value if bad() and self.second else y

        monkeypatch.setattr(GatedMLP, "second", False, raising=False)
        monkeypatch.setattr(GatedMLP, "forward", spoilt)
        post_init = Training.__post_init__

        def mark(self):
            post_init(self)
            mlps = [m for m in self.engine.model.modules() if isinstance(m, GatedMLP)]
            mlps[1].second = True

        monkeypatch.setattr(Training, "__post_init__", mark)
    elif where == "loss":
        of = loop.loss_of
        monkeypatch.setattr(
            loop, "loss_of", lambda run, batch: of(run, batch) + (value if bad() else 0.0)
        )
    else:
        add = loop.add_gradients

        def add_gradients(run, batch, scale):
            loss = add(run, batch, scale)
            if bad():
                run.parameters[-1].grad[0] = value
            return loss

        monkeypatch.setattr(loop, "add_gradients", add_gradients)


def two_layers(tmp_path, name, **changes):
    model = {"model_type": "gla", "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2,
             "intermediate_size": 48, "tie_word_embeddings": False}  # fmt: skip
    return write_config(
        tmp_path, name, "gla", peft=CALM, new_model=model, skip_eval=True, save_steps=1,
        max_steps=6, save_total_limit=9, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("where", ["loss", "gradient", "output"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(where, value, tmp_path, monkeypatch):
    spoil(monkeypatch, where, value, first=3, last=3)
    result = train(two_layers(tmp_path, "spoilt"))
    assert (result.outcome, result.steps, result.skipped_steps) == ("finished", 6, 1)
    assert json.loads((result.run_dir / "result.json").read_text())["skipped_steps"] == 1
    assert [row["skipped_steps"] for row in metrics(result.run_dir)] == [0, 0, 1, 1, 1, 1]
    saved = [
        load_checkpoint(result.run_dir / "checkpoints" / f"step-{step:08d}").tensors
        for step in (2, 3, 4)
    ]
    for group in ("trainable", "optimizer"):
        before, after, later = (tensors[group] for tensors in saved)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(not torch.equal(after[name], later[name]) for name in after)


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("output", f"the first output that is not finite is that of {MLP};"),
        ("loss", "every module's output is finite, but the loss is not"),
        ("gradient", "every module's output and the loss are finite, so a gradient is not"),
    ],
)
def test_too_many_of_them_end_the_run_and_say_where(where, named, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, where, math.nan, first=3, last=99)
    result = train(two_layers(tmp_path, "spoilt", max_bad_steps=3))
    assert (result.outcome, result.steps, result.skipped_steps) == ("bad_loss", 5, 3)
    assert result.exported is None
    said = capsys.readouterr().out
    assert "ended after 5 steps, the last of them bad (max_bad_steps): " + named in said
    assert "; step-00000004 is kept" in said
    kept = load_checkpoint(result.run_dir / "checkpoints" / "step-00000004").tensors
    good = load_checkpoint(result.run_dir / "checkpoints" / "step-00000002").tensors
    assert all(torch.equal(kept["trainable"][name], t) for name, t in good["trainable"].items())


# ---------------------------------------------------------------- spikes


def poison(monkeypatch, first: int, last: int) -> list[tuple[int, int]]:
    """Batches `first` to `last` (from 0) have huge losses. Returns (optimizer step, batch) of every
    step, from 1 and from 0."""
    seen: list[tuple[int, int]] = []
    now: list[int] = []
    made, step, of = ready.make_batches, loop.train_step, loop.loss_of

    def make_batches(*given):
        now.append(given[-1])
        return made(*given)

    def train_step(run, number):
        report = step(run, number)
        seen.append((number + 1, now[-1]))
        return report

    monkeypatch.setattr(ready, "make_batches", make_batches)
    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(
        loop, "loss_of",
        lambda run, batch: of(run, batch) * (100 if first <= now[-1] <= last else 1),
    )  # fmt: skip
    return seen


def test_a_run_goes_back_at_a_spike_and_past_its_batches(tmp_path, monkeypatch, capsys):
    changes = {"max_steps": 50, "save_steps": 10, "skip_eval": True, "eval_steps": 99}
    seen = poison(monkeypatch, 43, 44)
    config = write_config(tmp_path, "back", "mamba", **changes, logging_steps=5, spike_rollbacks=2)
    result = train(config)
    # The loss of batch 43 is read with the log of step 45.
    assert seen == [
        *((k, k - 1) for k in range(1, 46)), *((k, k + 4) for k in range(41, 51))
    ]  # fmt: skip
    rows = metrics(result.run_dir)
    assert [row["step"] for row in rows] == [*range(5, 55, 5)]
    assert rows[-1]["spikes"] == 2 and max(row["loss"] for row in rows) < 10
    assert all(
        json.loads(line)["tokens_per_second"] > 0
        for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()
    )
    said = capsys.readouterr().out
    assert ": back to step 40, and past the batches of 5 steps (1 of 2 times)" in said
    state = find_resume_point(result.run_dir)[0].state["train"]
    assert (state["rollbacks"], state["passed_over"], state["step"]) == (1, 5, 50)


def test_a_run_goes_back_so_often_and_no_more(tmp_path, monkeypatch):
    seen = poison(monkeypatch, 43, 99)
    config = write_config(
        tmp_path, "back", "mamba", max_steps=50, save_steps=10, skip_eval=True, spike_rollbacks=2
    )
    result = train(config)
    assert result.outcome == "finished" and len(seen) == 44 + 1 + 1 + 9
    state = find_resume_point(result.run_dir)[0].state["train"]
    assert (state["rollbacks"], state["passed_over"]) == (2, 5)


def test_what_was_passed_over_stays_so_after_a_kill(tmp_path, monkeypatch):
    changes = {"max_steps": 50, "save_steps": 10, "skip_eval": True, "spike_rollbacks": 2}
    with monkeypatch.context() as patch:
        poison(patch, 43, 44)
        whole = train(write_config(tmp_path, "whole", "mamba", **changes))
    poison(monkeypatch, 43, 44)
    config = write_config(tmp_path, "killed", "mamba", **changes)

    rows = []

    def die(run_dir, row):
        rows.append(row["step"])
        if rows.count(42) == 2:  # after the run went back, before it saves in the course of things
            raise KeyboardInterrupt

    with observed(die), pytest.raises(KeyboardInterrupt):
        train(config)
    again = train(config, resume=True)
    assert_same_run(again.run_dir, whole.run_dir)


# ---------------------------------------------------------------- memory


def limit_memory(monkeypatch, tokens: int) -> list[int]:
    """A forward of more tokens than that runs out of memory after a layer. Returns the sizes that
    did."""
    failed = []
    of = loop.loss_of

    def loss_of(run, batch):
        if batch.input_ids.numel() > tokens:
            # as in a backward that stops half way
            of(run, batch).backward()
            failed.append(batch.input_ids.numel())
            raise torch.OutOfMemoryError("no memory")
        return of(run, batch)

    monkeypatch.setattr(loop, "loss_of", loss_of)
    return failed


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["gla", "mamba"])
def test_halved_batches_have_the_same_gradient(family, packed, tmp_path, monkeypatch, capsys):
    seen: dict[str, list] = {}
    name = "whole"
    step = Replicated.step

    def record(self, *given, **options):
        seen.setdefault(name, []).append([p.grad.clone() for p in self.parameters])
        return step(self, *given, **options)

    monkeypatch.setattr(Replicated, "step", record)
    changes = (PACKED if packed else {}) | {
        "learning_rate": 0.0, "skip_eval": True, "max_steps": 3, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    train(write_config(tmp_path, "whole", family, **changes))
    failed = limit_memory(monkeypatch, 20)
    name = "halved"
    train(write_config(tmp_path, "halved", family, oom="shrink", **changes))
    assert failed and sorted(failed, reverse=True) == failed  # each size fails once
    for whole, halved in zip(seen["whole"], seen["halved"], strict=True):
        for a, b in zip(whole, halved, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert f"out of memory: batches of {failed[0]:,} tokens and more are halved" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "out of memory on a batch of 4 x 18 tokens: lower batch_size, and raise gradient_acc"),
        (PACKED, "out of memory on a packed row of 64 tokens: lower tokens_per_batch, or set gr"),
        ({"batch_size": 1, "oom": "shrink"}, "out of memory on a batch of 1 x "),
    ],
    ids=["padded", "packed", "one row"],
)
def test_out_of_memory_says_the_shape_and_what_to_change(changes, said, tmp_path, monkeypatch):
    limit_memory(monkeypatch, 3)
    config = write_config(
        tmp_path, "large", "mamba", skip_eval=True, group_by_length=False, **changes
    )
    with pytest.raises(InputError) as error:
        train(config)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("oom", ["stop", "shrink"])
def test_a_first_batch_that_is_too_large_is_said_before_anything_is_written(
    oom, tmp_path, monkeypatch
):
    of = MambaAdapter.token_losses

    def token_losses(self, model, batch):
        if len(batch.input_ids) > 1:
            raise torch.OutOfMemoryError("no memory")
        return of(model, batch)

    monkeypatch.setattr(MambaAdapter, "token_losses", token_losses)
    config = write_config(tmp_path, "large", "mamba", skip_eval=True, max_steps=2, oom=oom)
    if oom == "shrink":
        assert train(config).outcome == "finished"
        return
    with pytest.raises(InputError, match="out of memory on a batch of 4 x"):
        train(config)
    assert not (tmp_path / "output").exists()


def test_out_of_memory_in_an_evaluation_says_what_to_change(tmp_path, monkeypatch):
    of = MambaAdapter.token_losses

    def token_losses(self, model, batch):
        if len(batch.input_ids) > 4:
            raise torch.OutOfMemoryError("no memory")
        return of(model, batch)

    monkeypatch.setattr(MambaAdapter, "token_losses", token_losses)
    with pytest.raises(InputError, match="evaluation with 8 examples a batch: lower eval_batch"):
        train(write_config(tmp_path, "eval", "mamba", max_steps=2))
    config = write_config(tmp_path, "smaller", "mamba", max_steps=2, eval_batch_size=4)
    assert train(config).outcome == "finished"


# ---------------------------------------------------------------- trackers, clock


class Failing:
    """A tracker whose service is down from some call on."""

    calls: dict[str, int] = {}

    def __init__(self, **_):
        self.call("init")

    def call(self, name):
        self.calls[name] = self.calls.get(name, 0) + 1
        if name == self.fails:
            raise ConnectionError("the service is down")

    def start(self):
        self.call("start")

    def store_init_configuration(self, values):
        self.call("store")

    def log(self, values, step):
        self.call("log")

    def finish(self):
        self.call("finish")


@pytest.mark.parametrize("fails", ["init", "start", "store", "log", "finish"])
def test_a_tracker_that_raises_does_not_end_training(fails, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Failing, "fails", fails, raising=False)
    monkeypatch.setattr(Failing, "calls", {})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Failing)
    config = write_config(tmp_path, "run", "mamba", trackers=["tensorboard"], max_steps=4)
    result = train(config)
    assert result.outcome == "finished"
    assert [row["step"] for row in metrics(result.run_dir, "train")] == [1, 2, 3, 4]
    said = capsys.readouterr().out
    assert said.count("warning: tracker tensorboard failed (ConnectionError: the service is") == 1
    assert Failing.calls[fails] == 1


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # its own thread
def test_a_tracker_whose_directory_is_gone_does_not_end_training(tmp_path, monkeypatch, capsys):
    """TensorBoard's, after the second row: a file stands in its place, where root cannot write
    either."""
    trained = RunLog.trained

    def take_away(self, row):
        trained(self, row)
        if row["step"] == 2:
            shutil.rmtree(self.run_dir / "tensorboard")
            (self.run_dir / "tensorboard").write_text("")

    monkeypatch.setattr(RunLog, "trained", take_away)
    result = train(write_config(tmp_path, "run", "mamba", trackers=["tensorboard"], max_steps=6))
    assert result.outcome == "finished"
    assert [row["step"] for row in metrics(result.run_dir, "train")] == [*range(1, 7)]
    assert capsys.readouterr().out.count("warning: tracker tensorboard failed") == 1


def test_a_clock_that_goes_back_changes_nothing(tmp_path, monkeypatch):
    changes = {"save_steps": 1, "max_steps": 5, "skip_eval": True}
    plain = train(write_config(tmp_path, "plain", "mamba", **changes))
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    config = write_config(tmp_path, "back", "mamba", **changes)
    back = train(config)
    assert_same_run(back.run_dir, plain.run_dir)
    rows = [json.loads(line) for line in (back.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["seconds"] >= 0 and row["tokens_per_second"] > 0 for row in rows)
    kept = {path.name: path for path in (back.run_dir / "checkpoints").glob("step-*")}
    assert sorted(kept) == ["step-00000004", "step-00000005"]
    for name, age in (("step-00000005", 10), ("step-00000004", 100)):  # the newest seems the oldest
        os.utime(kept[name], (age, age))
    assert find_resume_point(back.run_dir)[0].step == 5
