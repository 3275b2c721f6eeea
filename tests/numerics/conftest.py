"""What the tests of kernels share."""

from __future__ import annotations

import pytest
import torch

GPU = torch.cuda.is_available()


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="needs a process without a GPU")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")]),
    ]
)
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where Triton kernels run: compiled on a GPU, without one in Triton's interpreter."""
    device: str = request.param
    return device
