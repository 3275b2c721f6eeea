"""The plan against peaks that were measured on a GPU, and in what it refuses to count."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE
from ssm_train.config import RunConfig, load_config
from ssm_train.errors import InputError
from ssm_train.plan import GIB, Plan, make_plan, settle_tokens

GLA: dict[str, Any] = {
    "model_type": "gla", "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4,
    "intermediate_size": 5632, "vocab_size": 32000,
}  # fmt: skip
MAMBA = {"model_type": "mamba", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 50280}
MAMBA2: dict[str, Any] = {
    "model_type": "mamba2", "hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64,
    "head_dim": 64, "n_groups": 1, "vocab_size": 50288,
}  # fmt: skip
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
    [
        (GLA, False, 21.5), (GLA, "mlp", 14.9), (GLA, "mixer", 16.7), (GLA, True, 5.9),
        (MAMBA, False, 30.4), (MAMBA2, False, 28.9), (MAMBA2, True, 13.3),
    ],
)  # fmt: skip
def test_peaks_are_those_of_a_gpu(
    tmp_path: Path, model: dict[str, Any], recompute: Any, measured: float
) -> None:
    """GiB on an H200, docs/log.md of 2026-11-30: LoRA of rank 16 in rows of 16,384 tokens."""
    found = plan(tmp_path, new_model=model, peft=LORA, gradient_checkpointing=recompute)
    assert found.peak(16_384) / GIB == pytest.approx(measured, rel=0.1)
    most = found.most_tokens(80 * GIB)
    assert found.peak(most) <= 80 * GIB < found.peak(int(1.2 * most))


def test_mamba_2_is_counted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2}
    found = plan(tmp_path, new_model={"model_type": "mamba2", "num_hidden_layers": 2} | sizes)
    inner, projections = 128, 2 * 128 + 2 * 16 + 8
    kept = 4 * 64 + 2 * (projections + inner) + 8 * 8  # y; fp32: residual, and steps of 8 heads
    assert found.per_token == 2 * kept + 2 * 3 * 64  # and around the layers


def test_what_is_trained_is_counted_with_its_optimizer(tmp_path: Path) -> None:
    adapter = plan(tmp_path, new_model=TINY, peft=LORA)
    full = plan(tmp_path, new_model=TINY)
    assert full.trained == full.parameters < adapter.parameters
    assert adapter.trained == adapter.parameters - full.parameters
    assert full.training == full.trained * (8 + 2)  # AdamW, and what autocast keeps
    assert full.weights == 4 * full.parameters
    # The frozen base in bf16, the factors and the gate's bias in fp32.
    assert 2 * adapter.parameters < adapter.weights < 2.1 * full.parameters + 4 * adapter.trained


@pytest.mark.parametrize("start", ["pissa", "olora", "lora_ga"])
def test_the_start_of_the_factors_changes_nothing(tmp_path: Path, start: str) -> None:
    peft = LORA | {"init_lora_weights": start}
    assert plan(tmp_path, new_model=TINY, peft=peft) == plan(tmp_path, new_model=TINY, peft=LORA)


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
    names = (
        "parameters",
        "vocabulary",
        "weights",
        "optimizer",
        "activations",
        "at",
        "peak",
        "largest",
    )
    assert [line.split()[0] for line in lines] == list(names)
    assert lines[1].endswith("32,000 ids assumed, as new_model says no vocab_size")
    assert lines[-1].split()[1] == "tokens_per_batch"
    assert "fit" not in "".join(lines)
    assert main(["plan", "--cfg", str(config), "--gib", "0.001"]) == DONE
    said = capsys.readouterr().out
    assert "nothing fits" in said and "GiB, which does not fit" in said
    config = write(tmp_path, new_model=TINY | {"vocab_size": 100}, peft=LORA)
    for gib, code in (("1", DONE), ("-1", BAD_INPUT), ("0", BAD_INPUT)):
        assert main(["plan", "--cfg", str(config), "--gib", gib]) == code
        assert "assumed" not in capsys.readouterr().out


def test_the_readme_s_run_can_be_planned(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", readme, re.M | re.S)
    values = yaml.safe_load(block) | {"new_model": MAMBA, "packing": False, "learning_rate": 1e-3}
    assert plan(tmp_path, **{k: v for k, v in values.items() if k != "model"}).tokens == 16 * 512


def test_padded_rows_need_a_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, new_model=TINY, peft=LORA, packing=False)
    assert main(["plan", "--cfg", str(config)]) == BAD_INPUT
    assert "plan needs max_length" in capsys.readouterr().err
    config = write(tmp_path, new_model=TINY, packing=False, max_length=128, batch_size=4)
    assert main(["plan", "--cfg", str(config)]) == DONE
    assert "batch_size" in capsys.readouterr().out


# ---------------------------------------------------------------- tokens_per_batch: auto

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def settled(
    directory: Path, free: float, monkeypatch: pytest.MonkeyPatch, **values: Any
) -> tuple[int, list[str]]:
    """What auto is on a GPU with `free` bytes, and what is said."""
    cfg, _ = load_config(
        write(directory, **{"tokens_per_batch": "auto", "peft": LORA} | values), {}, {}
    )
    monkeypatch.setattr("ssm_train.plan.free_memory", lambda device: free)
    cfg, lines = settle_tokens(cfg, CUDA)
    return cfg.row_tokens, lines


def test_auto_is_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 76.3 * GIB
    most = plan(tmp_path, new_model=GLA, peft=LORA).most_tokens(memory)
    tokens, lines = settled(tmp_path, memory, monkeypatch, new_model=GLA)
    assert tokens % 1024 == 0 and tokens <= most < tokens + 1024 < 65_536
    peak = plan(tmp_path, new_model=GLA, peft=LORA, tokens_per_batch=tokens).peak(tokens) / GIB
    assert lines == [
        f"tokens_per_batch auto: {tokens:,} tokens fit into 76.3 GiB free "
        f"(plan: {peak:.1f} GiB at peak)"
    ]
    assert settled(tmp_path, 100 * memory, monkeypatch, new_model=GLA)[0] == 65_536


def test_auto_holds_the_longest_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = plan(tmp_path, new_model=TINY, peft=LORA).most_tokens(GIB)
    assert most % 1024 > 1
    values: dict[str, Any] = {"new_model": TINY, "max_length": most}
    assert settled(tmp_path, GIB, monkeypatch, **values)[0] == most
    assert settled(tmp_path, 9 * GIB, monkeypatch, **values | {"max_length": 70_001})[0] == 70_001
    with pytest.raises(InputError) as caught:
        settled(tmp_path, GIB, monkeypatch, **values | {"max_length": most + 1})
    for part in (f"max_length {most + 1:,} does not fit", "1.0 GiB free", f"{most:,} tokens do"):
        assert part in str(caught.value)
    assert "gradient_checkpointing" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a row of 1,024 tokens does not fit into 0.0 GiB free, 0"):
        settled(tmp_path, 1000, monkeypatch, new_model=TINY)


def test_auto_fits_the_gpu_with_the_least_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = settled(tmp_path, GIB, monkeypatch, new_model=TINY)
    monkeypatch.setattr("ssm_train.distributed.gather_objects", lambda items: [*items, GIB])
    assert settled(tmp_path, 5 * GIB, monkeypatch, new_model=TINY) == alone


def test_auto_leaves_numbers_and_cpus_alone(tmp_path: Path) -> None:
    def on_cpu(**values: Any) -> tuple[RunConfig, list[str]]:
        return settle_tokens(load_config(write(tmp_path, new_model=TINY, **values))[0], CPU)

    assert on_cpu(tokens_per_batch=64)[0].row_tokens == 64
    assert on_cpu(tokens_per_batch=64)[1] == []
    cfg, lines = on_cpu(tokens_per_batch="auto")
    assert cfg.row_tokens == 16_384
    assert lines == ["tokens_per_batch auto: 16,384 tokens, as the device is cpu"]
    assert on_cpu(tokens_per_batch="auto", max_length=20_000)[0].row_tokens == 20_000


def test_auto_needs_a_family_that_the_plan_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = {"model_type": "bamba", "hidden_size": 64, "num_hidden_layers": 2}
    said = "auto: plan does not know .* bamba keep; set tokens_per_batch to a number"
    with pytest.raises(InputError, match=said):
        settled(tmp_path, GIB, monkeypatch, new_model=unknown, peft=None)
    with pytest.raises(InputError, match="^target_modules: 'nope' matches no module"):
        wrong = LORA | {"target_modules": ["nope"]}
        settled(tmp_path, GIB, monkeypatch, new_model=TINY, peft=wrong)


def test_gradients_that_stay_leave_less_room(tmp_path: Path) -> None:
    one = plan(tmp_path, new_model=TINY, cuda_graphs=False)
    two = plan(tmp_path, new_model=TINY, cuda_graphs=False, gradient_accumulation_steps=2)
    assert plan(tmp_path, new_model=TINY) == two  # graphs add to gradients that stay
    assert two.fixed - one.fixed == one.gradients > 0
    assert two.peak(1024) == two.fixed + 1024 * (one.per_token + one.recomputed) + one.logits
    assert two.most_tokens(GIB) < one.most_tokens(GIB)


def test_the_command_shows_what_auto_would_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, new_model=TINY, peft=LORA, tokens_per_batch="auto")
    assert main(["plan", "--cfg", str(config), "--gib", "1"]) == DONE
    first, *lines = capsys.readouterr().out.splitlines()
    match = re.match(r"tokens_per_batch auto: ([\d,]+) tokens fit into 1.0 GiB free", first)
    assert match is not None and f"{match[1]} tokens, " in "".join(lines)
    assert main(["plan", "--cfg", str(config), "--gib", "0.001"]) == BAD_INPUT
    assert "tokens_per_batch auto: a row of 1,024 tokens" in capsys.readouterr().err
