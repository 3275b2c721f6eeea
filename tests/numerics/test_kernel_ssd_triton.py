"""A step of Mamba-2 in Triton against the plain one. Without a GPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton needs Linux")

from ssm_train.kernels.ssd import ssd, triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "groups", "P", "n", "skip"),
    [(2, 1, 16, 32, True), (4, 2, 24, 40, True), (3, 3, 5, 3, False)],
)
def test_steps_are_those_of_the_reference(
    kernel_device, monkeypatch, dtype, heads, groups, P, n, skip
):
    monkeypatch.setattr(triton, "ELEMENTS", 256)  # several programs a head
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(kernel_device)

    x = draw(3, 4, heads, P).to(dtype)
    B, C = draw(2, 3, 4, groups, n).to(dtype)
    dt = F.softplus(draw(3, 4, heads))
    dt[1, 2] = 0  # as at padding: the state passes unchanged
    A, D = -draw(heads).exp(), draw(heads) if skip else None
    state = draw(3, heads, P, n)
    expected, final = ssd(x, dt, A, B, C, D=D, initial_state=state, output_final_state=True)
    place = state.data_ptr()
    found = [
        triton.ssd_step(
            x[:, t : t + 1], dt[:, t : t + 1], A, B[:, t : t + 1], C[:, t : t + 1], D, state
        )
        for t in range(4)
    ]  # views with gaps between the rows
    assert state.data_ptr() == place
    tolerance = (
        {"rtol": 0, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    )
    torch.testing.assert_close(torch.cat(found, 1), expected, **tolerance)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-5)
