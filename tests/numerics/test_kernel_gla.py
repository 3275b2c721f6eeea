"""gla against fla's naive recurrence, a float64 loop of the paper's equation, and gradcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fla.ops.gla.naive import naive_recurrent_gla
from gradients import value_and_gradients
from torch import Tensor

from ssm_train.kernels.gla import gla, reference

NAMES = ("q", "k", "v", "g", "initial_state")
GATES = {
    "typical": lambda x: F.logsigmoid(x) / 16,
    "strong": lambda x: F.logsigmoid(x) * 4,
    "-50": lambda x: F.logsigmoid(x) * 0 - 50,
    "closed": lambda x: F.logsigmoid(x) * 1e4,
    "none": torch.zeros_like,
    "rarely closed": lambda x: torch.where(x > 1.8, -1e4, F.logsigmoid(x) / 16),
    "mixed": lambda x: F.logsigmoid(x) * 10.0 ** (torch.arange(x.shape[-1]) % 6 - 3),
}


def make_inputs(rows=2, length=37, heads=2, K=8, V=6, gates="typical", states=None):
    torch.manual_seed(length)
    shape = (rows, length, heads, K)
    values = {
        "q": torch.randn(shape),
        "k": torch.randn(shape),
        "v": torch.randn(rows, length, heads, V),
        "g": GATES[gates](torch.randn(shape)),
        "initial_state": torch.randn(states or rows, heads, K, V),
    }
    return {name: v.requires_grad_() for name, v in values.items()}


def gla_by_the_paper(q, k, v, g, initial_state) -> tuple[Tensor, Tensor]:
    """Equation 3 of arXiv 2312.06635, a step at a time, in float64."""
    q, k, v, g, S = (x.double() for x in (q, k, v, g, initial_state))
    outputs = []
    for t in range(q.shape[1]):
        S = g[:, t, :, :, None].exp() * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * q.shape[-1] ** -0.5, S))
    return torch.stack(outputs, 1), S


def gla_by_fla(q, k, v, g, initial_state):
    return naive_recurrent_gla(q, k, v, g, initial_state, output_final_state=True)


def gla_here(**inputs):
    return gla(**inputs, output_final_state=True)


def by_document(op, bounds, initial_state, **inputs):
    """Each document through `op` alone."""
    results = []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        piece = slice(start, end)
        state = initial_state[n : n + 1]
        results.append(op(**{x: y[:, piece] for x, y in inputs.items()}, initial_state=state))
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, 1), torch.cat(states)


def assert_equal(got: list[Tensor], expected: list[Tensor], tol: float = 1e-5) -> None:
    """Largest difference within `tol` of the largest element (of 1, where that is smaller)."""
    names = ("o", "final_state", *NAMES)
    for name, a, b in zip(names, got, expected, strict=True):
        assert a.shape == b.shape, name
        assert a.isfinite().all(), name
        difference = (a.double() - b.double()).abs().max().item()
        assert difference <= tol * max(1.0, b.abs().max().item()), (name, difference)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 300])
def test_equals_fla_and_the_equation(gates, length):
    inputs = make_inputs(length=length, K=7, V=5, gates=gates)
    got = value_and_gradients(gla_here, inputs)
    assert_equal(got, value_and_gradients(gla_by_the_paper, inputs))
    assert_equal(got, value_and_gradients(gla_by_fla, inputs))


def test_a_layer_of_usual_size():
    inputs = make_inputs(rows=1, length=200, heads=2, K=64, V=128)
    expected = value_and_gradients(gla_by_the_paper, inputs)
    assert_equal(value_and_gradients(gla_here, inputs), expected)


@pytest.mark.parametrize("gate", [-0.3, -0.61, -1.2, -2.4, -9.7, -39.0, -41.0])
def test_one_channel_near_the_limit_of_mild_gates(gate):
    """With one channel nothing averages out: factors up to exp(40), or one more bisection."""
    inputs = make_inputs(length=64, K=1, V=1)
    with torch.no_grad():
        inputs["g"].fill_(gate)
    expected = value_and_gradients(gla_by_the_paper, inputs)
    assert_equal(value_and_gradients(gla_here, inputs), expected)


def test_a_weak_gate_after_strong_ones_keeps_its_digits():
    """fp32 sums of 60 gates of -1e4 would know -0.1 only to 0.03."""
    inputs = make_inputs(length=64, K=1, V=1)
    with torch.no_grad():
        inputs["g"][:, :60] = -1e4
        inputs["g"][:, 60:] = -0.1
    expected = value_and_gradients(gla_by_the_paper, inputs)
    assert_equal(value_and_gradients(gla_here, inputs), expected, tol=1e-6)


def test_minus_infinity_is_a_reset():
    inputs = make_inputs(length=90)
    with torch.no_grad():
        inputs["g"][:, 41] = -torch.inf
    got = value_and_gradients(gla_here, inputs)
    late = {name: inputs[name][:, 41:] for name in "qkvg"}
    alone, state = gla(**late, output_final_state=True)
    torch.testing.assert_close(got[0][:, 41:], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], state, rtol=0, atol=1e-5)
    assert all(x.isfinite().all() for x in got)
    assert (got[2 + NAMES.index("initial_state")] != 0).any()  # through the tokens before it


@pytest.mark.parametrize("gates", ["typical", "strong", "mixed"])
@pytest.mark.parametrize("length, bounds", [(1, None), (18, None), (21, (0, 1, 1, 19, 21))])
def test_gradcheck(gates, length, bounds):
    documents = 1 if bounds is None else len(bounds) - 1
    inputs = make_inputs(rows=1, length=length, heads=1, K=2, V=1, gates=gates, states=documents)
    double = [x.detach().double().requires_grad_() for x in inputs.values()]
    cu_seqlens = None if bounds is None else torch.tensor(bounds)

    def run(q, k, v, g, initial_state):
        return gla_here(q=q, k=k, v=v, g=g, initial_state=initial_state, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(run, double)


@pytest.mark.parametrize("gates", ["typical", "strong"])
@pytest.mark.parametrize("boundary", range(1, 70))
def test_documents_are_separate_at_every_offset(boundary, gates):
    bounds = [0, boundary, 70]
    inputs = make_inputs(rows=1, length=70, gates=gates, K=4, V=3, states=2)

    def packed(**inputs):
        return gla_here(**inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))

    def separate(**inputs):
        return by_document(gla_here, bounds, **inputs)

    got = value_and_gradients(packed, inputs)
    assert_equal(got, value_and_gradients(separate, inputs), tol=3e-6)
    # No leak, not even a tiny one: with the other document poisoned, bits stay.
    with torch.no_grad():
        for x in (inputs["k"], inputs["v"]):
            x[:, boundary:] = torch.nan
        first = packed(**inputs)
        assert torch.equal(first[0][:, :boundary], got[0][:, :boundary])
        assert torch.equal(first[1][0], got[1][0])
        fresh = make_inputs(rows=1, length=70, gates=gates, K=4, V=3, states=2)
        for x in (fresh["k"], fresh["v"], fresh["g"]):
            x[:, :boundary] = torch.nan
        second = packed(**fresh)
        assert torch.equal(second[0][:, boundary:], got[0][:, boundary:])
        assert torch.equal(second[1][1], got[1][1])


@pytest.mark.parametrize("gates", ["typical", "strong", "mixed"])
@pytest.mark.parametrize("bounds", [(0, 1, 2, 3), (0, 1, 130, 131, 200, 264), (0, 64, 128), (0, 9)])
def test_packed_documents_equal_the_equation(bounds, gates):
    inputs = make_inputs(rows=1, length=bounds[-1], gates=gates, states=len(bounds) - 1)
    got = value_and_gradients(
        lambda **inputs: gla_here(**inputs, cu_seqlens=torch.tensor(bounds)), inputs
    )
    expected = value_and_gradients(
        lambda **inputs: by_document(gla_by_the_paper, bounds, **inputs), inputs
    )
    assert_equal(got, expected)


def test_an_empty_document_returns_its_initial_state():
    inputs = make_inputs(rows=1, length=20, states=4)
    bounds = torch.tensor([0, 0, 12, 12, 20])
    o, state = gla_here(**inputs, cu_seqlens=bounds)
    assert torch.equal(state[[0, 2]], inputs["initial_state"][[0, 2]])
    kept = inputs | {"initial_state": inputs["initial_state"][[1, 3]]}
    assert torch.equal(o, gla_here(**kept, cu_seqlens=torch.tensor([0, 12, 20]))[0])


@pytest.mark.parametrize("gates", ["typical", "strong"])
@pytest.mark.parametrize("split", [1, 63, 64, 99])
def test_two_halves_equal_the_whole(split, gates):
    inputs = make_inputs(length=100, gates=gates)

    def halves(initial_state, **inputs):
        early = {name: x[:, :split] for name, x in inputs.items()}
        late = {name: x[:, split:] for name, x in inputs.items()}
        o1, state = gla_here(**early, initial_state=initial_state)
        o2, state = gla_here(**late, initial_state=state)
        return torch.cat([o1, o2], 1), state

    got = value_and_gradients(halves, inputs)
    assert_equal(got, value_and_gradients(gla_here, inputs), tol=2e-6)


def test_token_by_token_equals_the_whole():
    inputs = make_inputs(length=70)
    whole, expected = gla_here(**inputs)
    state, outputs = inputs["initial_state"], []
    for t in range(70):
        token = {name: inputs[name][:, t : t + 1] for name in "qkvg"}
        o, state = gla_here(**token, initial_state=state)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 40]])
def test_a_trained_state_serves_every_sequence(cu_seqlens):
    rows = 2 if cu_seqlens is None else 1
    bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    inputs = make_inputs(rows=rows, length=40, states=1)

    def shared(**inputs):
        return gla_here(**inputs, cu_seqlens=bounds)

    def repeated(initial_state, **inputs):
        return shared(**inputs, initial_state=initial_state.repeat(2, 1, 1, 1))

    got = value_and_gradients(shared, inputs)
    assert_equal(got, value_and_gradients(repeated, inputs), tol=1e-6)
    none = gla(**{name: inputs[name] for name in "qkvg"}, cu_seqlens=bounds)[0]
    zeros = inputs | {"initial_state": torch.zeros_like(inputs["initial_state"])}
    assert torch.equal(none, shared(**zeros)[0])


@pytest.mark.parametrize("padding", [1, 17, 64])
def test_padding_leaves_the_state_untouched(padding):
    inputs = make_inputs(length=40)
    o, state = gla_here(**inputs)
    for side in ("left", "right"):
        pad = (0, 0, 0, 0, padding, 0) if side == "left" else (0, 0, 0, 0, 0, padding)
        padded = {name: F.pad(inputs[name], pad) for name in "qkg"}
        padded["v"] = F.pad(inputs["v"], pad, value=3.0)
        got, got_state = gla_here(**padded, initial_state=inputs["initial_state"])
        kept = got[:, padding:] if side == "left" else got[:, :40]
        torch.testing.assert_close(kept, o, rtol=0, atol=1e-5)
        torch.testing.assert_close(got_state, state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", reference.CHUNK_COST)
def test_chunks_of_every_size_agree(size, monkeypatch):
    inputs = make_inputs(length=130, gates="mixed", K=5)
    expected = value_and_gradients(gla_by_the_paper, inputs)
    monkeypatch.setattr(reference, "CHUNK_COST", {size: 1.0})
    assert_equal(value_and_gradients(gla_here, inputs), expected)


def test_one_strong_gate_bisects_only_its_own_chunk(monkeypatch):
    seen = []
    bisect = reference._bisected
    monkeypatch.setattr(
        reference, "_bisected", lambda q, *rest: seen.append(q.shape[:2]) or bisect(q, *rest)
    )
    inputs = make_inputs(length=512, heads=2)
    with torch.no_grad():
        inputs["g"][1, 301, 1, 3] = -90.0
    gla_here(**inputs)
    sizes = [tuple(shape) for shape in seen]
    assert sizes == [(1, size) for size in (64, 32, 16, 8, 4, 2)], sizes


def test_bf16_is_fp32_arithmetic_on_rounded_inputs():
    inputs = {name: x.detach().bfloat16() for name, x in make_inputs(length=100).items()}
    o, state = gla_here(**inputs)
    exact, exact_state = gla_here(**{name: x.float() for name, x in inputs.items()})
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(o, exact.bfloat16()) and torch.equal(state, exact_state)


def test_autocast_changes_nothing():
    """With the backward pass outside autocast, as PyTorch asks."""
    inputs = make_inputs(length=100)

    def under_autocast(**inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return gla_here(**inputs)

    expected = value_and_gradients(gla_here, inputs)
    for a, b in zip(value_and_gradients(under_autocast, inputs), expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_scale_and_what_is_returned():
    inputs = make_inputs(length=20)
    o, state = gla(**inputs)
    assert state is None and o.shape == inputs["v"].shape
    torch.testing.assert_close(gla(**inputs, scale=2.0)[0], o * 2 * 8**0.5, rtol=1e-5, atol=1e-5)
