"""A CUDA graph that cannot be recorded leaves stream, random numbers and memory as they were."""

from __future__ import annotations

import gc

import pytest
import torch

from ssm_train.recording import NotRecorded, record


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("fault", ["wait", "copy", "bug"])
def test_a_failed_recording_leaves_nothing(fault: str, random: bool) -> None:
    """A wait for the device ends it, which CUDA says; a copy to the host PyTorch refuses, and CUDA
    does not mind; nor does it a fault of Python's."""
    device = torch.device("cuda")

    def draw() -> torch.Tensor:
        return torch.rand(4, device=device)

    def fail() -> None:
        x = torch.ones(2**24, device=device)  # 64 MiB of the pool
        if random:
            draw()
        if fault == "wait":
            torch.cuda.synchronize()
        elif fault == "copy":
            x.tolist()
        else:
            raise RuntimeError("not captured")

    torch.manual_seed(1)
    expected = [draw().tolist() for _ in range(2)]
    with record(device, random=False) as earlier:
        still = torch.ones((), device=device) + 1
    torch.manual_seed(1)
    torch.cuda.empty_cache()
    stream, reserved = torch.cuda.current_stream(), torch.cuda.memory_reserved()
    found = [draw().tolist()]
    reason = ""
    try:
        with record(device, random=random):
            fail()
    except NotRecorded as error:  # pytest.raises would keep it, and it keeps what `fail` made
        reason = str(error)
    assert "captur" in reason
    found.append(draw().tolist())
    assert found == expected
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.memory_reserved() == reserved
    earlier.replay()
    assert float(still) == 2

    with record(device) as graph:
        drawn = draw()
    values = set()
    for _ in range(3):
        graph.replay()
        values.add(tuple(drawn.tolist()))
    assert len(values) == 3
