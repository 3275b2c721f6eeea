"""How long a user waits: from the start of the process to the end of the first optimizer step.

    python benchmarks/cold_start.py --model gla-1.3b mamba-1.4b --out cold.json

Writes a checkpoint of random weights, then runs `ssm-train train` on it with an empty Triton cache,
LoRA on all projections, packed rows of 16,384 tokens and the shipped defaults, preflight included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from throughput import MODELS, SPECIAL

from ssm_train.adapters import registry
from ssm_train.adapters.base import ModelSpec
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.record.environment import describe_environment

FIRST_STEP = "step 1/"
TEXTS = ["the ship is a boat , and the boat sails on .", "a cat sat on the mat"]


def write_checkpoint(model: str, directory: Path, device: str) -> None:
    spec = ModelSpec(
        new_model=MODELS[model] | SPECIAL, dtype=torch.bfloat16, device=device,
        place=device,
    )  # fmt: skip
    adapter, _ = registry.resolve(spec)
    prepared: Any = adapter.prepare(spec)
    prepared.model.save_pretrained(directory)
    tokenizer = build_tokenizer(TEXTS, {"type": "word", "vocab_size": 5000})
    tokenizer.save_pretrained(directory)


def write_config(model: Path, directory: Path, device: str, tokens: int) -> Path:
    path = directory / "cold.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": str(model), "data": "random_256", "device": device,
                "peft": {"peft_type": "LORA", "r": 16, "lora_alpha": 16},
                "packing": True, "tokens_per_batch": tokens, "max_steps": 2, "logging_steps": 1,
                "skip_eval": True, "no_save": True, "output_root": str(directory),
            }
        )
    )  # fmt: skip
    return path


def time_lines(config: Path, cache: Path) -> list[tuple[float, str]]:
    """(seconds since the start, line) of a run."""
    began = time.perf_counter()
    run = subprocess.Popen(
        [sys.executable, "-u", "-m", "ssm_train", "train", "--cfg", str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"TRITON_CACHE_DIR": str(cache), "XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        lines.append((time.perf_counter() - began, line.rstrip()))
        print(f"{lines[-1][0]:6.1f} {lines[-1][1]}", flush=True)
    assert run.wait() == 0, "the run failed"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": describe_environment(), "seconds": {}, "lines": {}}
    for model in arguments.model:
        directory = Path(tempfile.mkdtemp(prefix="cold_start_"))
        write_checkpoint(model, directory / "model", arguments.device)
        config = write_config(directory / "model", directory, arguments.device, arguments.tokens)
        lines = time_lines(config, directory / "cache")
        results["seconds"][model] = next(s for s, line in lines if line.startswith(FIRST_STEP))
        results["lines"][model] = lines
        print(f"{model}: first step done after {results['seconds'][model]:.1f} s", flush=True)
        shutil.rmtree(directory)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
