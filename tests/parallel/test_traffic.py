"""What `ssm-train plan --gpus` says that engines exchange, against what two processes do."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from collectives import CollectiveCount
from engine_runs import CALM, ROOT, environment, spawn
from tiny_runs import train, write_config

from ssm_train import shares

BYTES_ACKNOWLEDGED = 120  # where Linux's struct tcp_info has tcpi_bytes_acked, 8 bytes
STEP = 3  # after the first, in which engines learn the model's order
LORA = {"peft": CALM | {"r": 8}}
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "gla": {"model_type": "gla", "num_heads": 2, "intermediate_size": 256} | SIZES,
    "mamba": {"model_type": "mamba", "state_size": 8} | SIZES | {"num_hidden_layers": 8},
}
ACCUMULATED = {"batch_size": 1, "gradient_accumulation_steps": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gla_lora_bf16": ("gla", LORA | {"prec": "bf16"}),
    "gla_lora_accumulated": ("gla", LORA | ACCUMULATED),
    "gla_full": ("gla", {}),
    "mamba_lora": ("mamba", LORA),
    "mamba_full_accumulated": ("mamba", ACCUMULATED),
}
# ZeRO-3 keeps a model of this size from forward to backward; these are its limits for larger ones.
RELEASED = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
HALF = {"stage3_max_reuse_distance": 400_000, "stage3_prefetch_bucket_size": 0}
ENGINES: dict[str, tuple[str, dict[str, int]]] = {
    "DDP": ("ddp", {}),
    "DDP, several hosts": ("ddp_hosts", {}),
    "ZeRO-1": ("zero1", {}),
    "ZeRO-2": ("zero2", {}),
    "ZeRO-3": ("zero3", {}),
    "ZeRO-3, all released": ("zero3", RELEASED),
    "ZeRO-3, a part released": ("zero3", HALF),
    "FSDP2": ("fsdp2", {}),
}


def count_all(directory: Path) -> None:
    """Each rank. Trains every case under every engine; what one step of each exchanged goes to a
    file."""
    from ssm_train import fit, loop

    count_parameters, train_step = fit.count_parameters, loop.train_step
    found: dict[str, Any] = {}
    limits: dict[str, int] = {}

    def see_whole(model: Any) -> tuple[int, int]:
        found["model"] = asdict(shares.measure(model, limits))
        return count_parameters(model)

    def count(run: Any, step: int) -> Any:
        if step != STEP:
            return train_step(run, step)
        before = settled_bytes()
        with CollectiveCount() as counted:
            report = train_step(run, step)
        report.read()
        found.update(sizes=counted.sizes, sent=settled_bytes() - before)
        return report

    fit.count_parameters, loop.train_step = see_whole, count
    for name, (engine, limits) in ENGINES.items():
        variables = environment(engine)
        if limits:
            variables["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(directory / f"{name}.json")
        os.environ.update(variables)
        for case in CASES:
            train(directory / f"{case}.yaml", overwrite=True)
            result = directory / f"{name}-{case}-{os.environ['RANK']}.json"
            result.write_text(json.dumps(found))
        for variable in variables:
            del os.environ[variable]


def settled_bytes() -> int:
    """All ranks. Once everything that was sent has arrived."""
    dist.barrier()
    time.sleep(0.1)
    return bytes_sent()


def bytes_sent() -> int:
    """Through all TCP sockets of this process, without headers and what was sent again."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{descriptor}"
        if not os.path.lexists(path) or not os.readlink(path).startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(descriptor))) as copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, BYTES_ACKNOWLEDGED)[0]
    return total


@pytest.fixture(scope="session")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with what all engines exchanged."""
    directory = tmp_path_factory.mktemp("traffic")
    for case, (family, changes) in CASES.items():
        # Nothing is saved or evaluated, which would gather weights before the counted step.
        values = {"max_steps": STEP + 1, "batch_size": 2, "skip_eval": True, "no_save": True}
        write_config(directory, case, family, new_model=MODELS[family], **values | changes)
    for name, (engine, limits) in ENGINES.items():
        if limits:
            config = json.loads((ROOT / "ds_configs" / f"{engine}.json").read_text())
            config["zero_optimization"] |= limits
            (directory / f"{name}.json").write_text(json.dumps(config))
    spawn(count_all, 2, directory)
    return directory


def planned(found: dict[str, Any], name: str, case: str) -> shares.Part:
    weights = {
        key: shares.Weights(**value) if isinstance(value, dict) else value
        for key, value in found["model"].items()
    }
    micro_batches = CASES[case][1].get("gradient_accumulation_steps", 1)
    parts = shares.divide(shares.Model(**weights), 2, micro_batches)
    return next(part for part in parts if part.engine == name.partition(",")[0])


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_engines_exchange_what_the_plan_says(name: str, case: str, counted: Path) -> None:
    for rank in (0, 1):
        found = json.loads((counted / f"{name}-{case}-{rank}.json").read_text())
        part, sizes = planned(found, name, case), found["sizes"]
        assert set(sizes) <= {"all_reduce", "all_gather", "reduce_scatter"}
        for kind, size in {
            "all_reduce": part.reduced, "all_gather": part.gathered,
            "reduce_scatter": part.scattered,
        }.items():  # fmt: skip
            assert sizes.get(kind, 0) == pytest.approx(size, rel=0.05, abs=64), kind
        # Of two processes each sends a half of what is gathered or scattered, and as much as is
        # reduced. gloo scatters by all-reduce, which NCCL does not.
        sent = sizes.get("all_reduce", 0) + sizes.get("all_gather", 0) / 2
        assert sent + sizes.get("reduce_scatter", 0) / 2 == pytest.approx(part.sent(2), rel=0.05)
        gloo = sent + sizes.get("reduce_scatter", 0)
        assert found["sent"] == pytest.approx(gloo, rel=0.05), "not all was counted"
