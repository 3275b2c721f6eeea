"""RMSNorm, plain and in Triton, against the definition in float64 and against transformers: values
and all gradients. Triton is compiled on a GPU, elsewhere in its interpreter."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton needs Linux")

from transformers.models.mamba.modeling_mamba import MambaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from ssm_train.kernels import rms_norm as op
from ssm_train.kernels.rms_norm import reference, triton

EPS = 1e-5
OPS = ("sum", "plain", "gated", "gate_first")


@pytest.fixture(params=["reference", "triton"])
def module(request, kernel_device, monkeypatch):
    """What is tested. With two programs each has several blocks of rows to go through."""
    monkeypatch.setattr(triton, "PROGRAMS", 2)
    return {"reference": reference, "triton": triton}[request.param]


def define(name, x, other, weight, group_size=None):
    """The papers' formulas, in the dtype of x: y, and the total of a sum."""
    total = {"sum": x + other, "gate_first": x * other * other.sigmoid()}.get(name, x)
    y = torch.cat(
        [
            part / (part.square().mean(-1, keepdim=True) + EPS).sqrt()
            for part in total.split(group_size or x.shape[-1], -1)
        ],
        -1,
    )
    y = y if weight is None else y * weight
    return (y * other * other.sigmoid() if name == "gated" else y), total


def run(module, name, x, other, weight, group_size=None):
    """The same by an implementation."""
    if name == "plain":
        return module.rms_norm(x, weight, EPS), x
    if name == "sum":
        return module.rms_norm(x, weight, EPS, residual=other)
    options = {"gate_first": name == "gate_first", "group_size": group_size}
    return module.gated_rms_norm(x, other, weight, EPS, **options), x


def make_inputs(shape, weighted=True, dtype=torch.float32, other_dtype=None, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    x, other, weight = (
        torch.randn(s, generator=generator).to(d or dtype).requires_grad_()
        for s, d in ((shape, None), (shape, other_dtype), (shape[-1:], weight_dtype))
    )
    return x, other, weight if weighted else None


def value_and_gradients(compute, name, inputs, both=True) -> list[Tensor]:
    """y, for a sum the total, and gradients of a loss in which every element counts; with `both`
    those of the total too."""
    y, total = compute(name, *inputs)
    generator = torch.Generator().manual_seed(1)
    outputs = [y, total] if name == "sum" else [y]
    loss = sum(
        (v.double().cpu() * torch.randn(v.shape, generator=generator, dtype=torch.float64)).sum()
        for v in outputs[: 1 + both]
    )
    trained = [v for v in inputs if v is not None and v.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return [v.cpu() for v in (*outputs, *gradients) if v is not None]


def on(device, inputs):
    return [None if v is None else v.detach().to(device).requires_grad_() for v in inputs]


def exact(inputs):
    return [None if v is None else v.detach().double().requires_grad_() for v in inputs]


def errors(found, expected) -> list[float]:
    """Largest differences, relative to the largest value where that is more than 1."""
    for got, wanted in zip(found, expected, strict=True):
        assert got.shape == wanted.shape
    return [
        ((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()
        for got, wanted in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 24), (3, 96), (130, 24), (2, 65, 24), (5, 1, 3, 500), (3, 2500), (24,), (0, 24)]
)
def test_values_and_gradients_follow_the_definition(module, kernel_device, name, weighted, shape):
    inputs = make_inputs(shape, weighted)
    for both in (True, False):
        found = value_and_gradients(
            lambda *v: run(module, *v), name, on(kernel_device, inputs), both
        )
        expected = value_and_gradients(define, name, exact(inputs), both)
        if 0 in shape:
            assert all(not got.any() for got in found)
        else:
            assert max(errors(found, expected)) < 1e-5


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", ["gated", "gate_first"])
@pytest.mark.parametrize("group_size", [1, 12, 24])
def test_groups_of_channels_are_apart(module, kernel_device, name, weighted, group_size):
    inputs = make_inputs((67, 24), weighted)
    found = value_and_gradients(
        lambda *v: run(module, *v, group_size), name, on(kernel_device, inputs)
    )
    expected = value_and_gradients(lambda *v: define(*v, group_size), name, exact(inputs))
    assert max(errors(found, expected)) < 1e-5


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtypes", ["bbb", "bfb", "bff", "fbb", "bbf"])
def test_bf16_is_rounded_once(kernel_device, name, dtypes, monkeypatch):
    """x, residual or gate, and weight in bf16 or fp32: errors against float64 of the same inputs
    are the reference's, which computes in fp32 and rounds."""
    monkeypatch.setattr(triton, "PROGRAMS", 2)
    dtype, other, weight = ({"b": torch.bfloat16, "f": torch.float32}[d] for d in dtypes)
    inputs = make_inputs((130, 96), True, dtype, other, weight)
    expected = value_and_gradients(define, name, exact(inputs))
    results = [
        value_and_gradients(lambda *v, m=m: run(m, *v), name, on(kernel_device, inputs))
        for m in (triton, reference)
    ]
    for got, plain in zip(*results, strict=True):
        assert got.dtype == plain.dtype
    # Triton's interpreter cuts digits off where a GPU rounds: an error twice as large.
    factor = 2.2 if kernel_device == "cpu" else 1.2
    for got, plain, wanted in zip(*results, expected, strict=True):
        error, allowed = ((v.double() - wanted).norm() / wanted.norm() for v in (got, plain))
        assert error < factor * allowed + 1e-5
    assert results[0][0].dtype == dtype


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtypes", ["bbb", "bfb", "fff"])
@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_made_again_to_the_bit(kernel_device, name, dtypes, weighted):
    dtype, other, weight = ({"b": torch.bfloat16, "f": torch.float32}[d] for d in dtypes)
    inputs = on(kernel_device, make_inputs((2, 65, 24), weighted, dtype, other, weight))
    y, _ = run(triton, name, *inputs)
    assert torch.equal(y.grad_fn.make_again(y.grad_fn), y)


@pytest.mark.parametrize("module_dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_of_the_norm(module, kernel_device, module_dtype):
    """It is rounded once, whatever x is, and so is its gradient."""
    x, residual, weight = on(kernel_device, make_inputs((7, 24)))
    plain, total = module.rms_norm(x, weight, EPS, residual=residual)
    y, same = module.rms_norm(x, weight, EPS, residual=residual, dtype=module_dtype)
    assert y.dtype == module_dtype and torch.equal(total, same)
    if kernel_device == "cuda" or module is reference:  # the interpreter cuts digits off
        assert torch.equal(y, plain.to(module_dtype))
    torch.testing.assert_close(y.float(), plain, rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32


@pytest.mark.parametrize("name", OPS)
def test_rows_of_a_projection_need_no_copy(module, kernel_device, name):
    """Slices with NaN between them: nothing outside a row is read, nothing inside is not written,
    where fresh memory is NaN too."""
    inputs = make_inputs((2, 35, 24))
    expected = value_and_gradients(define, name, exact(inputs))
    sliced = []
    for v in inputs[:2]:
        wide = torch.full((2, 35, 80), float("nan"), device=kernel_device)
        wide[..., 8:32] = v.detach()
        sliced.append(wide[..., 8:32].requires_grad_())
        assert triton.as_rows(sliced[-1]).data_ptr() == sliced[-1].data_ptr()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        assert torch.empty(3).isnan().all()
        found = value_and_gradients(
            lambda *v: run(module, *v), name, [*sliced, *on(kernel_device, inputs[2:])]
        )
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert max(errors(found, expected)) < 1e-5


def test_columns_of_a_matrix_are_copied(kernel_device):
    x, _, weight = on(kernel_device, make_inputs((24, 35)))
    y = triton.rms_norm(x.mT, weight[:1].expand(24), EPS)
    expected = reference.rms_norm(x.mT, weight[:1].expand(24), EPS)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(v.sum(), (x, weight)) for v in (y, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_a_frozen_weight_has_no_sums(kernel_device, name, monkeypatch):
    """And the sums of a trained one are the same each time."""
    monkeypatch.setattr(triton, "PROGRAMS", 2)
    x, other, weight = on(kernel_device, make_inputs((300, 24)))
    sums = []
    new_empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor,
        "new_empty",
        lambda self, *v, **options: sums.append(v[0]) or new_empty(self, *v, **options),
    )

    def compute(weight):
        return value_and_gradients(lambda *v: run(triton, *v), name, (x, other, weight))

    trained, again, frozen = compute(weight), compute(weight), compute(weight.detach())
    assert sums.count((2, 24)) == 2  # twice trained
    for first, second in zip(trained, again, strict=True):
        assert torch.equal(first, second)
    for got, wanted in zip(frozen, trained, strict=False):
        assert torch.equal(got, wanted)
    assert len(frozen) == len(trained) - 1


def test_only_the_total_is_used(kernel_device):
    x, residual, weight = on(kernel_device, make_inputs((5, 24)))
    _, total = triton.rms_norm(x, weight, EPS, residual=residual)
    pull = torch.randn_like(total)
    for grad in torch.autograd.grad((total * pull).sum(), (x, residual)):
        torch.testing.assert_close(grad, pull)


@pytest.mark.parametrize("name", OPS)
def test_autocast_changes_nothing(module, kernel_device, name):
    inputs = on(kernel_device, make_inputs((7, 24), other_dtype=torch.bfloat16))
    results = []
    for enabled in (True, False):
        with torch.autocast(kernel_device, torch.bfloat16, enabled=enabled):
            results.append(value_and_gradients(lambda *v: run(module, *v), name, inputs))
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


# ---------------------------------------------------------------- the public ops


def test_agrees_with_transformers():
    x, gate, weight = make_inputs((2, 7, 24))
    plain, gated = MambaRMSNorm(24, EPS), make_gated()
    for norm in (plain, gated):
        norm.weight.data.copy_(weight)
    options = {"gate_first": True, "group_size": getattr(gated, "group_size", None)}
    pairs = (
        (op.rms_norm(x, weight, EPS), plain(x)),
        (op.gated_rms_norm(x, gate, weight, EPS, **options), gated(x, gate)),
    )
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def make_gated() -> MambaRMSNormGated:
    try:
        return MambaRMSNormGated(24, 8, EPS)
    except TypeError:  # before its groups, transformers normed all channels together
        return MambaRMSNormGated(24, EPS)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck_in_float64(kernel_device, name):
    """Float64 goes to the reference, also on a GPU."""
    inputs = [v.double().detach().to(kernel_device).requires_grad_() for v in make_inputs((3, 6))]
    torch.autograd.gradcheck(lambda *v: run(op, name, *v), inputs)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_device_chooses(kernel_device, kernels):
    x = torch.zeros(2, device=kernel_device)
    on_gpu = kernel_device == "cuda" and kernels == "auto"
    assert op.choose(x, kernels) is (triton if on_gpu else reference)
    assert op.choose(x.double(), kernels) is reference


def test_without_a_backward_pass_nothing_stays(kernel_device):
    """What is saved of an output must not keep the graph that made it."""
    x, residual, weight = on(kernel_device, make_inputs((3, 8), dtype=torch.bfloat16))
    y, total = triton.rms_norm(x, weight, EPS, residual=residual.detach().float())
    node = weakref.ref(total.grad_fn)
    del y, total
    assert node() is None
