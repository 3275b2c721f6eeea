"""`result.json` of real runs: what it says is what the run measured, and it is there only once the
run has ended."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from safetensors.torch import load_file
from tiny_runs import LORA, SIDES, metrics, stop_in_step, train, write_config

from ssm_train import ready as root
from ssm_train.record.report import find_runs, report_runs


def result_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text(encoding="utf-8"))


def measured(run_dir: Path, split: str, step: int) -> dict[str, float]:
    (row,) = [row for row in metrics(run_dir, split) if row["step"] == step]
    return {key: value for key, value in row.items() if key not in ("split", "step")}


def test_a_stopped_run_and_its_resumed_end(tmp_path, monkeypatch):
    """The result of the first launch is gone while the second one trains."""
    test_data = str(tmp_path / "test.jsonl")
    config = write_config(
        tmp_path, "lora", "mamba", peft=LORA, eval_at_start=True, test_data=test_data
    )
    with monkeypatch.context() as patch:
        stop_in_step(patch, 4)
        stopped = train(config)
    run_dir = stopped.run_dir
    result = result_of(run_dir)
    assert (result["outcome"], result["steps"], result["test"]) == ("stopped", 5, {})
    assert result["best_step"] == 4
    assert result["metrics"] == measured(run_dir, "val", 4)
    assert "stopped (step 5)" in report_runs(find_runs([tmp_path]))

    there = []
    original = root.make_batches

    def make_batches(dataset: Any, order: Any, cfg: Any, k: int) -> Any:
        there.append((k, (run_dir / "result.json").exists()))
        return original(dataset, order, cfg, k)

    with monkeypatch.context() as patch:
        patch.setattr(root, "make_batches", make_batches)
        finished = train(config, resume=True)
    trained = [exists for k, exists in there if k >= 5]
    assert trained == [False] * 3  # steps 5, 6, 7; those of the preflight are step 0
    result = result_of(run_dir)
    assert (result["outcome"], result["steps"], result["main_metric"]) == ("finished", 8, "loss")
    assert result["best_step"] == finished.best_step
    assert result["metrics"] == measured(run_dir, "val", finished.best_step)
    assert result["before"] == measured(run_dir, "val", 0)
    assert result["test"] == measured(run_dir, "test", finished.best_step)
    adapter = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    base = load_file(run_dir / "base" / "model.safetensors")
    assert result["trainable"] == sum(tensor.numel() for tensor in adapter.values())
    assert result["parameters"] == sum(
        tensor.numel() for tensors in (adapter, base) for tensor in tensors.values()
    )
    assert result["tokens_per_second"] == median(finished.rates) > 0
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    own = [row["seconds"] for row in rows if row["split"] == "train" and row["step"] > 5]
    assert result["seconds"] > sum(own) > 0  # of this launch, and evaluations beside
    text = report_runs(find_runs([tmp_path]))
    assert f"{result['metrics']['loss']:.4f}" in text and text.endswith("  finished")


def test_a_run_whose_metric_is_too_low(tmp_path):
    least = {0: 1.1}
    config = write_config(tmp_path, "low", "mamba", task=SIDES, min_eval_metric_after_epoch=least)
    run_dir = train(config).run_dir
    result = result_of(run_dir)
    ended = (result["outcome"], result["steps"], result["main_metric"])
    assert ended == ("low_metric", 4, "accuracy")
    assert result["metrics"] == measured(run_dir, "val", 4)
    assert result["trainable"] == result["parameters"]
    assert result["before"] == result["test"] == {}
