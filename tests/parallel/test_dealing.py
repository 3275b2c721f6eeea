"""Under ZeRO-3 and FSDP2 rank 0 makes the weights, and no process ever has a model of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from engine_runs import environment, spawn

from ssm_train import distributed
from ssm_train.adapters import registry
from ssm_train.adapters.base import ModelSpec
from ssm_train.engines import build_engine
from ssm_train.engines.zero_config import Numbers
from ssm_train.parts import local

MODELS = {
    "gla": {"model_type": "gla", "hidden_size": 128, "num_hidden_layers": 4, "num_heads": 2},
    "mamba": {"model_type": "mamba", "hidden_size": 128, "num_hidden_layers": 4, "state_size": 8},
}
SPECIAL = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def make(family: str, place: str | None) -> torch.nn.Module:
    distributed.seed_everything(0)
    spec = ModelSpec(new_model=MODELS[family] | SPECIAL, place=place)
    adapter, _ = registry.resolve(spec)
    return adapter.prepare(spec).model


def equal_parameters(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    tensors = dict(model.named_parameters())
    return {*tensors} == {*expected} and all(p.equal(expected[n]) for n, p in tensors.items())


def deal(name: str, family: str, directory: Path) -> None:
    """Each rank. Leaves what it held, and whether the weights are those that one process makes."""
    os.environ.update(environment(name))
    engine = build_engine(
        distributed.build_accelerator("fp32", "cpu"), Numbers("fp32", 1, 1, 1.0, True)
    )
    alone = dict(make(family, None).named_parameters())
    model = make(family, engine.place)
    found = {
        "total": sum(p.numel() for p in alone.values()),
        "names": len(alone),
        "made": sorted({str(p.device) for p in model.parameters()}),
    }
    proof = engine.spread(model)
    found["spread"] = sum(local(p).numel() for p in proof.parameters())
    del proof
    engine.prepare(model, lambda net: torch.optim.AdamW(net.parameters()))
    parts = (getattr(p, "ds_tensor", p) for p in model.parameters())
    found["held"] = sum(local(part).numel() for part in parts)
    with engine.whole() as whole:
        found["same"] = equal_parameters(whole, alone)
    with engine.for_writing() as written:
        found["written"] = None if written is None else equal_parameters(written, alone)
    found["trained"] = len(engine.trained())
    assert {*engine.trained()} <= {*alone}
    (directory / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
@pytest.mark.parametrize("family", MODELS)
def test_no_process_has_all_weights(name: str, family: str, tmp_path: Path) -> None:
    spawn(deal, 2, name, family, tmp_path)
    for rank, place in enumerate(("cpu", "meta")):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["made"] == [place]
        assert found["spread"] < 0.6 * found["total"]  # small ones are whole under ZeRO-3
        assert found["held"] < 0.6 * found["total"]
        assert found["same"]
        # What is written gathers on rank 0 alone, on the CPU.
        assert found["written"] is (True if rank == 0 else None)
        assert found["trained"] == (found["names"] if rank == 0 else 0)
