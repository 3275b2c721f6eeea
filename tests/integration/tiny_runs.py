"""Whole runs of tiny models on a few sentences: configs, records, and what two runs share."""

import json
import os
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from ssm_train.config import load_config
from ssm_train.record.summary import Result
from ssm_train.train import run

MODELS: dict[str, dict[str, Any]] = {
    "gla": {"num_heads": 2, "intermediate_size": 48, "initializer_range": 0.08},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "bamba": {
        "num_hidden_layers": 2,
        "attn_layer_indices": [1],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "lora_dropout": 0.2}
PISSA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": "pissa"}
LORA_GA = PISSA | {
    "init_lora_weights": "lora_ga",
    "loraga_batch_size": 2,
    "loraga_steps": 3,
    "loraplus_lr_ratio": 4.0,
}
SPARSE = {
    "peft_type": "SD_LORA",
    "num_freeze": {"channel": 0.8, "state": 0.5},
    "num_zero": {"channel": 0.1},
    "proj_lora_dropout": 0.0,
    "num_warmup_it": 3,
}

COUNTING = {"type": "generation", "prompt": "{question} =>", "label": "{answer}"}
SIDES = {
    "type": "classification",
    "prompt": "{question} is",
    "label_field": "side",
    "labels": {"left": "left", "right": "right"},
}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
CLOCK = {"seconds", "tokens_per_second", "memory_gib"}


def make_records(count: int, first: int = 0) -> list[dict[str, str]]:
    """Sentences of 3 to 9 words and their numbers backwards; no two alike."""
    records = []
    for i in range(first, first + count):
        words = [NUMBERS[(i * 5 + k * (i // 8 + 1)) % 8] for k in range(1 + i % 7)]
        records.append(
            {
                "question": f"say {' '.join(words)} {NUMBERS[i % 8]}",
                "answer": " ".join(reversed(words)),
                "side": "left" if i % 2 else "right",
            }
        )
    return records


def write_data(directory: Path) -> None:
    for split, (count, first) in {"train": (24, 0), "val": (9, 30), "test": (7, 50)}.items():
        lines = [json.dumps(record) + "\n" for record in make_records(count, first)]
        (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_config(directory: Path, name: str, family: str, **changes: Any) -> Path:
    """`<name>.yaml` in `directory`, with data beside it; a change to None takes a key away."""
    if not (directory / "train.jsonl").exists():
        write_data(directory)
    values: dict[str, Any] = {
        "new_model": {
            "model_type": family,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
        }
        | MODELS[family],
        "tokenizer": {"type": "word"},
        "data": str(directory / "train.jsonl"),
        "val_data": str(directory / "val.jsonl"),
        "task": COUNTING,
        "prec": "fp32",
        "device": "cpu",
        "batch_size": 4,
        "max_steps": 8,
        "logging_steps": 1,
        "eval_steps": 4,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "output_root": str(directory / "output"),
    }
    values = {key: value for key, value in (values | changes).items() if value is not None}
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def train(config: Path, **overrides: Any) -> Result:
    """run() of a config file, with `key=value` of the command line."""
    cfg, provenance = load_config(config, {k: json.dumps(v) for k, v in overrides.items()})
    return run(cfg, provenance, config)


def stop_in_step(monkeypatch: Any, step: int) -> None:
    """SIGUSR1 while optimizer step `step` (from 0) is under way."""
    from ssm_train import ready as root

    original = root.make_batches
    once = iter([True])

    def make_batches(dataset: Any, order: Any, cfg: Any, k: int) -> Any:
        if k == step and next(once, False):
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(dataset, order, cfg, k)

    monkeypatch.setattr(root, "make_batches", make_batches)


def metrics(run_dir: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in CLOCK}
        for row in rows
        if split in (None, row["split"])
    ]


def losses(run_dir: Path, split: str = "train") -> list[float]:
    return [row["loss"] for row in metrics(run_dir, split)]


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    """Tensors of the adapter, or of the model after full fine-tuning."""
    adapter = run_dir / "adapter" / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else run_dir / "model" / "model.safetensors")


def assert_same_tensors(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0
) -> None:
    """Same names; same bits, or at most `tolerance` apart."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        if tolerance:
            torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=0)
        else:
            assert torch.equal(tensor, expected[name]), name


def assert_same_run(actual: Path, expected: Path, unlike: Collection[str] = ()) -> None:
    """Bit for bit: every loss and metric, exported weights, last checkpoint, random states (but
    for those in `unlike`)."""
    assert metrics(actual) == metrics(expected)
    assert_same_tensors(exported(actual), exported(expected))
    last = (expected / "checkpoints" / "last").read_text().strip()
    assert (actual / "checkpoints" / "last").read_text().strip() == last
    ours, theirs = actual / "checkpoints" / last, expected / "checkpoints" / last
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    for file in sorted(theirs.iterdir()):
        if file.suffix == ".safetensors":
            assert_same_tensors(load_file(ours / file.name), load_file(file))
        elif file.name != "manifest.json":
            a, b = (json.loads((run / file.name).read_text()) for run in (ours, theirs))
            differ = {key for key in a | b if a.get(key) != b.get(key)}
            assert differ <= set(unlike), file.name
