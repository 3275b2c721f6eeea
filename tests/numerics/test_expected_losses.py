"""Losses of 20 steps from a fixed seed, per family: whoever changes numbers must mean to.

The tables are what `python tests/numerics/test_expected_losses.py` prints.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from ssm_train.config import load_config
from ssm_train.train import run

MODELS: dict[str, dict[str, Any]] = {
    "gla": {"num_heads": 2, "intermediate_size": 64, "initializer_range": 0.08},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 24, "n_groups": 1},
}
# fmt: off
EXPECTED: dict[str, list[float]] = {
    "gla": [
        4.68915, 4.16080, 4.31703, 3.76377, 4.36221, 3.98536, 3.30430, 3.53647, 3.21490, 3.91189,
        2.97491, 3.77359, 3.20642, 3.55151, 2.96389, 2.96343, 2.61580, 3.14668, 2.64207, 2.54743,
    ],
    "mamba": [
        4.88616, 4.28490, 4.65974, 3.67792, 4.35981, 4.01289, 3.32138, 3.49732, 3.17132, 4.04134,
        2.99887, 3.79120, 3.08809, 3.67678, 2.96545, 2.96102, 2.33993, 3.14066, 2.57776, 2.36228,
    ],
    "mamba2": [
        4.91408, 4.24483, 4.45190, 3.72598, 4.46744, 3.97886, 3.20455, 3.46067, 3.05738, 4.04137,
        2.84333, 3.77782, 2.86441, 3.56212, 2.77430, 2.65793, 2.20117, 3.07269, 2.39549, 2.19051,
    ],
}
# fmt: on


def train(family: str, directory: Path) -> list[float]:
    """Full fine-tuning of a new model on the quickstart's base task, fp32, on the CPU."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "tie_word_embeddings": False}
    values = {
        "new_model": {"model_type": family} | sizes | MODELS[family],
        "tokenizer": {"type": "word"},
        "data": "quickstart_base_128",
        "prec": "fp32",
        "device": "cpu",
        "batch_size": 8,
        "max_steps": 20,
        "logging_steps": 1,
        "learning_rate": 5e-3,
        "skip_eval": True,
        "no_save": True,
        "output_root": str(directory),
    }
    path = directory / f"{family}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    cfg, provenance = load_config(path)
    rows = (run(cfg, provenance, path).run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


@pytest.mark.parametrize("family", MODELS)
def test_losses_of_twenty_steps(family, tmp_path):
    assert train(family, tmp_path) == pytest.approx(EXPECTED[family], abs=1e-4)


if __name__ == "__main__":
    with TemporaryDirectory() as directory:
        tables = {family: train(family, Path(directory)) for family in MODELS}
    for family, table in tables.items():
        lines = [table[i : i + 10] for i in range(0, len(table), 10)]
        text = "".join(f"        {' '.join(f'{x:.5f},' for x in line)}\n" for line in lines)
        sys.stdout.write(f'    "{family}": [\n{text}    ],\n')
