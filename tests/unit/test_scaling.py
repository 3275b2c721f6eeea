"""The plan over GPUs, against numbers worked out by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE
from ssm_train.fit import warn_of_engine
from ssm_train.plan import Plan
from ssm_train.scaling import Cluster, Outlook, warn_of_parts
from ssm_train.shares import Model, Part, Weights, divide, measure

ROOT = Path(__file__).parents[2]
LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 16}
GLA = {"model_type": "gla", "hidden_size": 256, "num_hidden_layers": 4, "num_heads": 4}
# Bytes. An adapter of 2,000 on 8,000 frozen ones.
ADAPTED = Model(
    all=Weights(8_000, 2_000), small=Weights(100, 300), odd=Weights(0, 2_000),
    root=Weights(1_000, 0), layer=Weights(500, 0), reused=0.25, prefetched=0.05, looked_up=800,
)  # fmt: skip
FULL = Model(
    all=Weights(0, 8_000), small=Weights(0, 400), odd=Weights(),
    root=Weights(0, 2_000), layer=Weights(0, 1_000), reused=0.5, prefetched=0.5, copies=4_000,
)  # fmt: skip
# Engine -> weights, optimizer, gradients, buffers; and what each of 4 processes sends.
ADAPTED_TWO_BATCHES = {
    "DDP": ([10_000, 4_000, 2_000, 2_000], 3_000),
    "ZeRO-1": ([10_000, 1_500, 2_500, 6_000], 4_500),
    "ZeRO-2": ([10_000, 1_500, 1_000, 6_000], 7_500),
    # Adapters whole; gathered: 2 batches x (2 x 8,000 - 1,000).
    "FSDP2": ([4_000, 4_000, 2_000, 4_000], 25_500),
    # 9,600 in parts, of which 0.3 are here; gathered: 2 batches x (9,600 + 8,800 x 0.75), and 400.
    "ZeRO-3": ([2_900, 1_500, 500, 6_880], 27_600),
}
FULL_ONE_BATCH = {
    "DDP": ([8_000, 16_000, 8_000, 12_000], 12_000),
    "ZeRO-1": ([8_000, 6_000, 10_000, 28_000], 18_000),
    "ZeRO-2": ([8_000, 6_000, 4_000, 28_000], 18_000),
    # Buffers: the root and two layers, their gradients, copies. Gathered 14,000, scattered 8,000.
    "FSDP2": ([2_000, 4_000, 2_000, 12_000], 16_500),
    # Gathered: 7,600 x 1.5, and 400; scattered 8,000.
    "ZeRO-3": ([2_400, 6_000, 2_000, 27_600], 14_850),
}


@pytest.mark.parametrize(
    ("model", "micro_batches", "expected"),
    [(ADAPTED, 2, ADAPTED_TWO_BATCHES), (FULL, 1, FULL_ONE_BATCH)],
)
def test_what_engines_hold_and_send(
    model: Model, micro_batches: int, expected: dict[str, tuple[list[float], float]]
) -> None:
    parts = divide(model, 4, micro_batches)
    assert [part.engine for part in parts] == list(expected)
    for part in parts:
        held, sent = expected[part.engine]
        found = [part.weights, part.optimizer, part.gradients, part.buffers]
        assert found == pytest.approx(held), part.engine
        assert part.fixed == pytest.approx(sum(held))
        assert part.sent(4) == pytest.approx(sent), part.engine


def test_whole_gradients_wait_for_the_last_micro_batch() -> None:
    one, two = ({p.engine: p for p in divide(FULL, 4, batches)} for batches in (1, 2))
    assert (one["FSDP2"].gradients, two["FSDP2"].gradients) == (2_000, 8_000)
    assert one["FSDP2"].buffers - two["FSDP2"].buffers == 2_000 + 2 * 1_000
    assert one["DDP"] == two["DDP"] and one["ZeRO-1"] == two["ZeRO-1"]
    assert two["ZeRO-2"].reduced == 2 * one["ZeRO-2"].reduced


def test_one_process_sends_nothing() -> None:
    part = Part("any", 0, 0, 0, 0, reduced=8, gathered=4, scattered=4)
    assert [part.sent(n) for n in (1, 2, 4)] == [0, 12, 18]


def test_an_evaluation_may_need_more_than_a_step() -> None:
    """A model in parts is whole on each GPU then, and gradients and buffers are gone."""
    plan = Plan(0, 0, 0, 0, 0, False, per_token=5, recomputed=2, working=0, logits=3, tokens=1)
    outlook = Outlook(Cluster(4, 1_000), plan, FULL, [])
    part = Part("any", weights=10, optimizer=20, gradients=10, buffers=10)
    assert outlook.peak(part) == 60
    assert outlook.peak(replace(part, whole=40)) == 70
    parts = {part.engine: part for part in divide(FULL, 4, 1)}
    assert parts["DDP"].whole == parts["ZeRO-2"].whole == 0
    assert parts["FSDP2"].whole == FULL.all.without(FULL.odd).all + FULL.copies
    assert parts["ZeRO-3"].whole == FULL.all.without(FULL.small).all + FULL.copies


class Toy(nn.Module):
    """A base of 64 parameters in bf16 and adapters of 16 in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(2))
        for layer in self.layers:
            layer["proj"] = nn.ModuleDict(
                {
                    "base_layer": nn.Linear(4, 4, bias=False, dtype=torch.bfloat16),
                    "lora_A": nn.Linear(4, 2, bias=False),
                }
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora" in name)


def test_a_model_is_counted_as_engines_tell_it_apart() -> None:
    limits = {
        "stage3_param_persistence_threshold": 10,
        "stage3_max_reuse_distance": 20,
        "stage3_prefetch_bucket_size": 8,
    }
    assert measure(Toy(), limits) == Model(
        all=Weights(2 * (32 + 2 * 16), 4 * 2 * 8),
        small=Weights(0, 64),
        odd=Weights(0, 64),
        root=Weights(64, 0),
        layer=Weights(32, 0),
        reused=24 / 80,  # the last layer
        prefetched=8 / 80,
        looked_up=64,
    )
    tied = Toy()
    tied.get_output_embeddings = lambda: tied.embedding  # type: ignore[assignment]
    assert measure(tied, limits).tied == 64
    tied.embedding.requires_grad_(True)
    assert measure(tied, limits).tied == 128
    # As in ds_configs/zero3.json: 40 elements stay whole, and nothing is released.
    shipped = measure(Toy(), {})
    assert shipped.small == shipped.all and shipped.reused == shipped.prefetched == 1


def test_the_warning_has_both_numbers() -> None:
    line = warn_of_parts("ZeRO-3", 2.72e9, 0.08e9, 8, 50e9)
    assert line.startswith("ZeRO-3 gathers frozen weights for nothing: ")
    assert "up to 4.760 GB in a micro-batch, 95.2 ms;" in line  # 2 x 2.72 x 7/8
    assert line.endswith("it sends 0.140 GB in a step")  # 2 x 0.08 x 7/8
    assert " ms" not in warn_of_parts("FSDP2", 2.72e9, 0.08e9, 8)


# ---------------------------------------------------------------- the command


def write(directory: Path, **values: Any) -> str:
    path = directory / "run.yaml"
    data = {"data": "random_64", "packing": True, "tokens_per_batch": 1024, "new_model": GLA}
    path.write_text(yaml.safe_dump(data | values))
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["plan", *arguments]) == DONE
    return capsys.readouterr().out.split("\n\n")[1].splitlines()


def test_lines_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, peft=LORA)
    arguments = ["--cfg", config, "--gib", "2", "--gpus", "8", "--net", "50"]
    first, header, *lines = said(capsys, *arguments, "--step-seconds", "0.1")
    assert first == "on 8 GPUs, GiB on each (of 2.00 GiB) and GB that each sends a step"
    assert header.split()[-4:] == ["sent", "ms", "of", "step"]
    rows = [line.split() for line in lines[:5]]
    assert [row[0] for row in rows] == ["DDP", "ZeRO-1", "ZeRO-2", "FSDP2", "ZeRO-3"]
    assert all(len(row) == 9 and row[-1].endswith("%") for row in rows)
    assert lines[5] == "advice  DDP: the simplest that fits"
    assert lines[6].startswith("ZeRO-3 or FSDP2 gathers frozen weights for nothing")
    assert len(said(capsys, *arguments[:-2])[2].split()) == 7  # without a network: no time


def test_advice_is_the_simplest_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, new_model=GLA | {"hidden_size": 1024, "num_hidden_layers": 24})
    seen = []
    for gib in ("40", "5.5", "1"):
        *_, advice = said(capsys, "--cfg", config, "--gib", gib, "--gpus", "64")
        seen.append(advice)
    assert seen[0] == "advice  DDP: the simplest that fits"
    assert seen[1] == "advice  ZeRO-2: the simplest that fits"
    assert seen[2] == "no engine fits: set gradient_checkpointing, or smaller rows"


def test_a_network_needs_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--cfg", write(tmp_path), "--net", "50"]) == BAD_INPUT
    assert "say how many with --gpus" in capsys.readouterr().err
    assert main(["plan", "--cfg", write(tmp_path), "--gpus", "8", "--net", "0"]) == BAD_INPUT
    assert "'0' is not a number above 0" in capsys.readouterr().err


def test_the_page_holds_the_command_s_tables() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling_plan.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert result.stdout.strip() in page, "docs/scaling.md: run benchmarks/scaling_plan.py again"


def test_a_run_is_told_that_frozen_weights_are_in_parts_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ssm_train.fit.distributed.world_size", lambda: 2)
    model: Any = nn.Sequential(nn.Linear(1000, 1000, bias=False).bfloat16(), nn.Linear(10, 10))
    model[0].requires_grad_(False)
    subject = SimpleNamespace(method=object(), prepared=SimpleNamespace(model=model))
    engine = SimpleNamespace(shards_weights=True, name="ZeRO-3")
    ready: Any = SimpleNamespace(subject=subject, engine=engine)
    (line,) = warn_of_engine(ready)
    assert line.startswith("warning: ZeRO-3 gathers frozen weights for nothing")
    engine.shards_weights = False
    assert not warn_of_engine(ready)
    engine.shards_weights, subject.method = True, None  # full fine-tuning
    assert not warn_of_engine(ready)
