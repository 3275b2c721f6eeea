"""The plan against peaks that were measured on a GPU, and in what it refuses to count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ssm_train.cli import BAD_INPUT, DONE, main
from ssm_train.config import load_config
from ssm_train.plan import GIB, Plan, make_plan

GLA: dict[str, Any] = {
    "model_type": "gla", "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4,
    "intermediate_size": 5632, "vocab_size": 32000,
}  # fmt: skip
MAMBA = {"model_type": "mamba", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 50280}
LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 16}
TINY = {"model_type": "gla", "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2}


def write(directory: Path, **values: Any) -> Path:
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump({"data": "random_64", "packing": True} | values))
    return path


def plan(directory: Path, **values: Any) -> Plan:
    cfg, _ = load_config(write(directory, **values), {}, {})
    return make_plan(cfg)


@pytest.mark.parametrize(
    ("model", "recompute", "measured"),
    [(GLA, False, 33.34), (MAMBA, False, 49.36)],
)
def test_peaks_are_those_of_an_h100(
    tmp_path: Path, model: dict[str, Any], recompute: Any, measured: float
) -> None:
    """GiB, docs/log.md of 2026-11-25: LoRA of rank 16 in rows of 16,384 tokens."""
    found = plan(tmp_path, new_model=model, peft=LORA, gradient_checkpointing=recompute)
    assert found.peak(16_384) / GIB == pytest.approx(measured, rel=0.1)
    most = found.most_tokens(80 * GIB)
    assert found.peak(most) <= 80 * GIB < found.peak(int(1.2 * most))


def test_mamba_2_is_counted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2}
    found = plan(tmp_path, new_model={"model_type": "mamba2", "num_hidden_layers": 2} | sizes)
    inner, projections = 128, 2 * 128 + 2 * 16 + 8
    rows = projections + (inner + 2 * 16) + inner + inner  # in_proj, convolution, y and its norm
    kept = 2 * 64 + 2 * (64 + rows) + 8 * 8  # the residual, the mixer, steps of 8 heads in fp32
    assert kept < found.per_token / 2 < 1.15 * kept  # and the head


def test_what_is_trained_is_counted_with_its_optimizer(tmp_path: Path) -> None:
    adapter = plan(tmp_path, new_model=TINY, peft=LORA)
    full = plan(tmp_path, new_model=TINY)
    assert full.trained == full.parameters < adapter.parameters
    assert adapter.trained == adapter.parameters - full.parameters
    assert full.training == full.trained * (8 + 2)  # AdamW, and what autocast keeps
    assert full.weights == 4 * full.parameters
    # The frozen base in bf16, the factors and the gate's bias in fp32.
    assert 2 * adapter.parameters < adapter.weights < 2.1 * full.parameters + 4 * adapter.trained


def test_recomputing_keeps_less(tmp_path: Path) -> None:
    peaks = [
        plan(tmp_path, new_model=GLA, peft=LORA, gradient_checkpointing=part).peak(16_384)
        for part in (False, "mixer", "mlp", True)
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_lines_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, new_model=TINY, peft=LORA)
    assert main(["plan", "--cfg", str(config), "--gib", "1"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    names = ("parameters", "weights", "optimizer", "activations", "logits", "peak", "largest")
    assert [line.split()[0] for line in lines] == list(names)
    assert lines[-1].split()[1] == "tokens_per_batch"
    assert main(["plan", "--cfg", str(config), "--gib", "0.001"]) == DONE
    assert "nothing fits" in capsys.readouterr().out


def test_padded_rows_need_a_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, new_model=TINY, peft=LORA, packing=False)
    assert main(["plan", "--cfg", str(config)]) == BAD_INPUT
    assert "plan needs max_length" in capsys.readouterr().err
    config = write(tmp_path, new_model=TINY, packing=False, max_length=128, batch_size=4)
    assert main(["plan", "--cfg", str(config)]) == DONE
    assert "batch_size" in capsys.readouterr().out
