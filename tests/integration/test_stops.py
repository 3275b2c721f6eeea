"""A stop that comes in an evaluation does not wait for its end: the run takes it when it goes on,
and ends as one that was not stopped."""

import os
import signal

import pytest
from tiny_runs import LORA, SIDES, assert_same_run, metrics, train, write_config

from ssm_train import evaluation
from ssm_train.checkpoint import latest_checkpoint
from ssm_train.cli import main
from ssm_train.commands import DONE, REQUEUE

DRAWING = {"max_new_tokens": 4, "do_sample": True}
CASES = {
    # Evaluations of 5 batches each: before training, of steps 4 and 8, and of the test split; with
    # generation twice as many.
    "before training": ({}, 2, 0, None),
    "loss": ({}, 7, 0, 4),
    "classification": ({"task": SIDES}, 7, 0, 4),
    "generation": ({"eval_gen": DRAWING}, 10, 10, 4),
    "last step": ({}, 12, 0, 8),
    "test": ({}, 17, 0, 8),
}


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    monkeypatch.setattr("ssm_train.record.summary.plot_metrics", lambda run_dirs, out: out)


@pytest.mark.parametrize("case", CASES)
def test_a_stop_in_an_evaluation(case, tmp_path, monkeypatch):
    changes, loss_batches, answers, step = CASES[case]
    changes = changes | {
        "peft": LORA, "batch_size": 2, "eval_batch_size": 2, "eval_at_start": True,
        "test_data": str(tmp_path / "test.jsonl"),
    }  # fmt: skip
    whole = train(write_config(tmp_path, "whole", "mamba", **changes))
    config = write_config(tmp_path, "stopped", "mamba", **changes)
    seen = []
    collate = evaluation.collate

    def stop_at(*given):
        seen.append(given)
        if len(seen) == loss_batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return collate(*given)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "collate", stop_at)
        assert main(["train", "--cfg", str(config)]) == REQUEUE
    assert len(seen) == loss_batches  # it ended before the next one
    run_dir = whole.run_dir.with_name("stopped")
    path, skipped = latest_checkpoint(run_dir)
    assert not skipped and (path and int(path.name[-8:])) == step
    assert len(metrics(run_dir, "val")) < len(metrics(whole.run_dir, "val")) or case == "test"
    assert main(["train", "--cfg", str(config), "--resume"]) == DONE
    assert_same_run(run_dir, whole.run_dir, unlike={"python"})
    assert metrics(run_dir, "test") == metrics(whole.run_dir, "test")
