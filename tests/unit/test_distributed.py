"""The Accelerator is the one that the config asks for, or an error says why it is not."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from ssm_train import distributed
from ssm_train.errors import InputError


def test_accelerate_may_not_divide_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(InputError, match="over 4 steps.*unset ACCELERATE_GRADIENT_ACC"):
        distributed.build_accelerator("fp32", "cpu")
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    assert distributed.build_accelerator("fp32", "cpu").gradient_accumulation_steps == 1


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_other_engines_are_refused(engine: str) -> None:
    found = SimpleNamespace(
        num_processes=1,
        device=torch.device("cpu"),
        gradient_accumulation_steps=1,
        distributed_type=SimpleNamespace(value=engine),
    )
    with pytest.raises(InputError, match=f"set to {engine}, but only NO, MULTI_CPU, MULTI_GPU"):
        distributed.check_accelerator(found, "cpu")


def test_a_second_run_has_its_own_precision_and_device() -> None:
    from accelerate import Accelerator

    distributed.build_accelerator("fp32", "cpu")
    PartialState().device = torch.device("meta")  # as a run on another device leaves it
    assert distributed.build_accelerator("bf16", "cpu").device.type == "cpu"
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")
    assert distributed.build_accelerator("fp32", "cpu").mixed_precision == "no"


def test_the_process_group_outlives_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (addresses | ranks).items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        for _ in range(2):
            distributed.build_accelerator("fp32", "cpu")
            assert torch.distributed.group.WORLD is group
    finally:
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_device_of_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(InputError, match="'cpu' asked for, but Accelerate chose 'meta'"):
        distributed.build_accelerator("fp32", "cpu")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set: start .* or unset RANK"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is 1, but WORLD_SIZE is 1: "),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2: "),
        ({"RANK": "one"}, "RANK is one, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "two"}, "RANK is 0, but WORLD_SIZE is two"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT not set"),
    ],
)
def test_a_rank_without_its_launch_is_an_error(variables: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        distributed.check_launch(variables)


def test_one_process_and_a_launch_are_right() -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variables in ({}, {"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "2"} | address):
        distributed.check_launch(variables)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """torch as it looks with two GPUs; the list holds the indices that were made current."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    yield current
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_gpu_of_several(two_gpus: list[int]) -> None:
    before = dict(os.environ)
    accelerator = distributed.build_accelerator("fp32", "cuda:1")
    assert accelerator.device == torch.device("cuda:1") and two_gpus == [1]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before.get("CUDA_VISIBLE_DEVICES")


def test_a_gpu_that_is_not_there(two_gpus: list[int]) -> None:
    with pytest.raises(InputError, match="'cuda:2' asked for, but torch sees 2 GPU"):
        distributed.build_accelerator("fp32", "cuda:2")
    assert two_gpus == []


def test_one_gpu_for_several_processes(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="is one GPU, but 2 processes"):
        distributed.build_accelerator("fp32", "cuda:1")
    assert two_gpus == []
