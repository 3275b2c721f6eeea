"""The Triton scan against a float64 loop of the paper's equation and against the reference: on a
GPU compiled, elsewhere in Triton's interpreter with chunks of a few steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton needs Linux")

from test_kernel_selective_scan import (
    NAMES,
    assert_close,
    make_inputs,
    scan_by_the_paper,
    value_and_gradients,
)
from triton import language as tl

from ssm_train.kernels.selective_scan import reference, triton


@pytest.fixture
def scan(kernel_device, monkeypatch):
    """The kernel where it runs, with `lengths`: of a step, a chunk, and several and a part."""
    if kernel_device == "cpu":
        monkeypatch.setattr(triton, "CHUNKS", (4, 4))
        monkeypatch.setattr(triton, "PROGRAMS", 8)
        monkeypatch.setattr(triton, "OFFSETS", tl.constexpr(2))
        monkeypatch.setattr(triton, "CHANNELS", 4)

    def run(**inputs):
        inputs = {k: v.to(kernel_device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        y, state = triton.selective_scan(**{"output_final_state": True, **inputs})
        return y.cpu(), None if state is None else state.cpu()

    run.chunk = triton.CHUNKS[0]  # inputs are so small that segments are as short as can be
    run.lengths = (1, 128, 300) if kernel_device == "cuda" else (1, 4, 11)
    return run


@pytest.mark.parametrize("per_channel", ["", "B", "C", "BC"])
def test_values_and_gradients_follow_the_paper(scan, per_channel):
    for length in scan.lengths:
        inputs = make_inputs(length=length, per_channel=per_channel)
        expected = value_and_gradients(scan_by_the_paper, inputs)
        assert_close(value_and_gradients(scan, inputs), expected)


@pytest.mark.parametrize("boundary", range(1, 9))
def test_documents_are_apart(scan, boundary):
    """A boundary at every place of a chunk, a document of one token behind it, and one of none."""
    length = scan.lengths[-1]
    first = boundary if length < 128 else 124 + boundary
    offsets = torch.tensor([0, first, first + 1, first + 1, length], dtype=torch.int32)
    inputs = make_inputs(rows=1, length=length, documents=4)
    results = [
        value_and_gradients(lambda op=op, **v: op(**v, cu_seqlens=offsets), inputs)
        for op in (scan, lambda **v: reference.selective_scan(**v, output_final_state=True))
    ]
    assert_close(*results)


DOCUMENTS = {  # for segments of at most c steps
    "around a segment": lambda c: [c, c + 1, 1, 0, 2 * c, c - 1],
    "one": lambda c: [3 * c + 1],
    "of a step each": lambda c: [1] * (c * c // 2 + 1),
    "without tokens": lambda c: [0, 0, 2, 0, 2 * c + 1, 0, 0],
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents_of_every_length(scan, case):
    lengths = DOCUMENTS[case](scan.chunk)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make_inputs(rows=1, length=sum(lengths), documents=len(lengths))
    results = [
        value_and_gradients(lambda op=op, **v: op(**v, cu_seqlens=offsets), inputs)
        for op in (scan, lambda **v: reference.selective_scan(**v, output_final_state=True))
    ]
    assert_close(*results)


def test_frozen_weights_have_no_gradient(scan):
    inputs = make_inputs(rows=1, length=scan.lengths[-1], channels=3)
    expected = dict(zip(NAMES, value_and_gradients(scan, inputs)[2:], strict=True))
    for name in ("A", "D"):
        inputs[name] = inputs[name].detach()
    y, state = scan(**inputs)
    trained = {k: v for k, v in inputs.items() if v.requires_grad}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (v * torch.randn(v.shape, generator=generator, dtype=torch.float64)).sum()
        for v in (y.double(), state.double())
    )
    gradients = torch.autograd.grad(loss, list(trained.values()))
    for name, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [1e30, float("nan")])
def test_nothing_leaks_over_a_boundary(scan, poison):
    length = scan.lengths[-1]
    inputs = make_inputs(rows=1, length=length, documents=1)
    offsets = torch.tensor([0, length // 2, length], dtype=torch.int32)
    y, _ = scan(**inputs, cu_seqlens=offsets)
    first_grad = torch.autograd.grad(y[:, length // 2 :].sum(), inputs["u"])[0][:, : length // 2]
    assert first_grad.abs().max() == 0
    poisoned = dict(inputs, u=inputs["u"].detach().clone())
    poisoned["u"][:, : length // 2] = poison
    found = scan(**poisoned, cu_seqlens=offsets)[0]
    assert torch.equal(found[:, length // 2 :], y[:, length // 2 :])


def test_softplus_and_padding(scan):
    """A step of -inf before its softplus passes the state; tiny ones are not rounded to 0."""
    inputs = make_inputs(length=scan.lengths[-1])
    raw = torch.randn(inputs["dt"].shape) * 8
    raw[:, 2:4] = -torch.inf
    raw[:, 5] = -18.0
    inputs["dt"] = raw.requires_grad_()
    y, state, *gradients = value_and_gradients(lambda **v: scan(**v, dt_softplus=True), inputs)
    expected = value_and_gradients(
        lambda **v: scan_by_the_paper(**dict(v, dt=F.softplus(v["dt"].double()))), inputs
    )
    assert_close([y, state, *gradients], expected)
    assert gradients[NAMES.index("dt")][:, 2:4].abs().max() == 0


@pytest.mark.parametrize("shared", [False, True])
def test_bf16_inputs_keep_an_fp32_state(scan, shared):
    inputs = make_inputs(length=scan.lengths[-1])
    for name in ("u", "B", "C", "z"):
        inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
    if shared:  # one initial state for all rows
        inputs["initial_state"] = inputs["initial_state"].detach()[:1].requires_grad_()
    expected = value_and_gradients(scan_by_the_paper, inputs)
    actual = value_and_gradients(scan, inputs)
    assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
    assert_close(actual[1:2], expected[1:2])
    assert_close(actual, expected, tolerance=1e-2)


def test_slices_of_a_projection_and_no_optional_inputs(scan):
    """Inputs that are not contiguous, as the mixer's are."""
    inputs = make_inputs(length=scan.lengths[-1], states=3)
    wide = torch.randn(2, scan.lengths[-1], 16, requires_grad=True)
    inputs = {k: inputs[k] for k in ("dt", "A")}

    def by(op, wide, **others):
        return op(u=wide[..., :5], B=wide[..., 5:8], C=wide[..., 8:11], **others)

    found = by(scan, wide, **inputs, output_final_state=False)
    expected, _ = by(reference.selective_scan, wide, **inputs)
    assert found[1] is None
    assert_close(found[:1], [expected])
    with torch.no_grad():  # no states are kept
        assert torch.equal(by(scan, wide, **inputs, output_final_state=False)[0], found[0])
    gradients = [torch.autograd.grad(y.square().sum(), wide)[0] for y in (found[0], expected)]
    assert_close(gradients[:1], gradients[1:])


def test_two_runs_are_equal_bit_for_bit(scan):
    inputs = make_inputs(length=scan.lengths[-1], channels=9)
    first, second = (value_and_gradients(scan, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_channel_without_memory_forgets_its_state(scan):
    """As SD_LORA makes them: A = -exp(69)."""
    inputs = make_inputs(length=scan.lengths[-1])
    inputs["A"] = inputs["A"].detach().index_fill(0, torch.tensor([2]), -1e30).requires_grad_()
    expected = value_and_gradients(scan_by_the_paper, inputs)
    actual = value_and_gradients(scan, inputs)
    assert all(value.isfinite().all() for value in actual)
    assert_close(actual, expected)
