"""GPUs, plans and slots."""

from pathlib import Path

import pytest

from ssm_train.errors import InputError
from ssm_train.launch.slots import CPU, plan_slots


def write_nvidia_smi(directory: Path, script: str) -> str:
    """A PATH on which `nvidia-smi` is this bash script."""
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    return str(directory)


@pytest.mark.parametrize(
    ("environment", "gpus", "devices"),
    [
        ({"GPU_IDS": "0 1"}, ("0", "1"), ("0", "1")),
        ({"GPU_IDS": "3, 1"}, ("3", "1"), ("3", "1")),
        ({"GPU_IDS": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, ("2",), ("2",)),
        ({"GPU_IDS": " ", "CUDA_VISIBLE_DEVICES": "4,5"}, ("4", "5"), ("4", "5")),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f-1,1"}, ("GPU-8f-1", "1"), ("GPU-8f-1", "1")),
        ({"CUDA_VISIBLE_DEVICES": ""}, (), (CPU,)),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, ("0",), ("0",)),
        ({"CUDA_VISIBLE_DEVICES": "", "GPU_PLAN": "2"}, (), (CPU, CPU)),
        ({"GPU_IDS": "0 1", "GPU_PLAN": "2"}, ("0", "1"), ("0", "0", "1", "1")),
        ({"GPU_IDS": "0 1 2", "GPU_PLAN": "2,0,1"}, ("0", "1", "2"), ("0", "0", "2")),
        ({"GPU_IDS": "0 1", "GPU_PLAN": "0 3"}, ("0", "1"), ("1", "1", "1")),
    ],
)
def test_slots(environment: dict[str, str], gpus: tuple, devices: tuple) -> None:
    slots = plan_slots(environment)
    assert slots.gpus == gpus
    assert slots.devices == devices


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"GPU_PLAN": "1 1 2"}, "GPU_PLAN: 3 numbers (1 1 2) for 2 GPUs (0 1)"),
        ({"GPU_PLAN": "0,0"}, "0 0 leaves no slot"),
        ({"GPU_PLAN": "0"}, "0 leaves no slot"),
        ({"GPU_PLAN": "1,-1"}, "'-1' is not a number of jobs"),
        ({"GPU_PLAN": "1.5"}, "'1.5' is not a number of jobs"),
        ({"GPU_PLAN": "two"}, "'two' is not a number of jobs"),
        ({"GPU_IDS": "0 first"}, "GPU_IDS: 'first'"),
        (
            {"GPU_IDS": "", "CUDA_VISIBLE_DEVICES": "", "GPU_PLAN": "1 1"},
            "2 numbers (1 1) for 1 device (CPU)",
        ),
    ],
)
def test_a_wrong_plan_is_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(InputError) as error:
        plan_slots({"GPU_IDS": "0 1", **environment})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_gpus_are_counted_without_their_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["GPU 0: A (UUID: GPU-1)", "  MIG 1g.5gb Device 0: (UUID: MIG-1)", "GPU 1: A (UUID: x)"]
    path = write_nvidia_smi(tmp_path, "".join(f"echo '{line}'\n" for line in lines))
    monkeypatch.setenv("PATH", path)
    assert plan_slots({}).devices == ("0", "1")


def test_a_driver_that_fails_is_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", write_nvidia_smi(tmp_path, "echo no driver here; exit 9"))
    assert plan_slots({}).devices == (CPU,)
    assert "no driver here" in capsys.readouterr().err


def test_a_machine_without_nvidia_smi_has_one_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert plan_slots({}).devices == (CPU,)
    assert capsys.readouterr().err == ""
