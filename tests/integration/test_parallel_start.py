"""Inits that change the base start from rank 0's result on every rank, whatever others found: the
signs and last digits of an SVD may differ between machines."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_tiny import inject, make_batch, prepare
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from ssm_train.adapters import common
from ssm_train.peft.lora import lora_layers

INITS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora", "use_dora": True},
    "lora_ga": {"init_lora_weights": "lora_ga", "rank_pattern": {"dt_proj": 1}},
}


def differently(decompose: Callable[..., Any]) -> Callable[..., Any]:
    """The same decomposition with other signs, and a thousandth off."""

    def decompose_differently(*inputs: Any, **options: Any) -> Any:
        found = decompose(*inputs, **options)
        first, *middle, last = found
        return type(found)((-1.001 * first, *middle, -last))

    return decompose_differently


def start(name: str) -> dict[str, Tensor]:
    """Every parameter of the adapted layers, factors and base, as training would begin."""
    torch.manual_seed(distributed.get_rank() if distributed.is_initialized() else 0)
    prepared = prepare("mamba")
    method = inject(prepared, **INITS[name])
    examples = (make_batch(1, 9 + k % 5, seed=20 + k) for k in count())
    method.calibrate(prepared, examples, common.token_losses)
    return {
        f"{layer_name}.{parameter_name}": parameter.detach().clone()
        for layer_name, layer in lora_layers(prepared.model).items()
        for parameter_name, parameter in layer.named_parameters()
    }


def worker(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    if rank == 1:
        torch.linalg.svd = differently(torch.linalg.svd)
        torch.linalg.qr = differently(torch.linalg.qr)  # svd_lowrank calls both
    alone = {name: start(name) for name in INITS}
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        together = {name: start(name) for name in INITS}
    finally:
        distributed.destroy_process_group()
    for what, starts in {"alone": alone, "together": together}.items():
        for name, tensors in starts.items():
            save_file(tensors, Path(directory, f"{what}-{name}-{rank}.safetensors"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("starts")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(place)), nprocs=2)
    return place


@pytest.mark.parametrize("name", INITS)
def test_ranks_start_alike_where_their_decompositions_differ(name: str, directory: Path) -> None:
    alone, together = (
        [load_file(directory / f"{what}-{name}-{rank}.safetensors") for rank in (0, 1)]
        for what in ("alone", "together")
    )
    assert alone[0].keys() == together[0].keys() == together[1].keys()
    for key, tensor in together[0].items():
        if "base_layer.bias" not in key:  # biases take no part
            assert not torch.equal(alone[0][key], alone[1][key]), key
        assert torch.equal(tensor, alone[0][key]), key
        assert torch.equal(together[1][key], tensor), key
