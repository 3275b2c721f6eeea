"""A step of GLA in Triton against the plain one. Without a GPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton needs Linux")

from ssm_train.kernels.gla import gla, triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("K", "V"), [(16, 32), (24, 40), (3, 5)])
def test_steps_are_those_of_the_reference(kernel_device, monkeypatch, dtype, K, V):
    monkeypatch.setattr(triton, "ELEMENTS", 256)  # several programs a head
    generator = torch.Generator().manual_seed(0)
    q, k, g = torch.randn(3, 3, 4, 2, K, generator=generator).to(kernel_device)
    v = torch.randn(3, 4, 2, V, generator=generator).to(kernel_device, dtype)
    q, k, g = q.to(dtype), k.to(dtype), torch.nn.functional.logsigmoid(g)
    g[1, 2] = -torch.inf  # a reset
    state = torch.randn(3, 2, K, V, generator=generator).to(kernel_device)
    expected, final = gla(q, k, v, g, initial_state=state, output_final_state=True)
    place = state.data_ptr()
    found = [
        triton.gla_step(*(x[:, t : t + 1] for x in (q, k, v, g)), state) for t in range(4)
    ]  # views with gaps between the rows
    assert state.data_ptr() == place
    tolerance = (
        {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    torch.testing.assert_close(torch.cat(found, 1), expected, **tolerance)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-5)
