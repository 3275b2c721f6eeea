"""What is cheap is made again and not kept: readers get the same bits, also inside checkpoints."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssm_train.adapters import modules, registry
from ssm_train.adapters.base import ModelSpec
from ssm_train.kernels import again as again_module
from ssm_train.kernels.again import find_maker, made_again, recomputed


class Square(torch.autograd.Function):
    """x -> x * x, and twice as much."""

    made = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.make_again = Square.make_again
        return x * x, 2 * x * x

    @staticmethod
    def make_again(ctx: Any) -> Tensor:
        Square.made += 1
        (x,) = ctx.saved_tensors
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, twice: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient + 4 * x * twice


@pytest.fixture(autouse=True)
def _count() -> None:
    Square.made = 0


def weights() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def draw() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(5, 6, dtype=torch.float64, requires_grad=True)


def readers(h: Tensor, again: bool) -> Tensor:
    """Two products of h, of which one sees it in another shape."""
    first, second = weights()
    readers.weights = [first, second]  # type: ignore[attr-defined]
    if not again:
        return F.linear(h, first).sum() + F.linear(h.view(5, 1, 6), second).square().sum()
    with made_again(h):
        one, other = F.linear(h, first), F.linear(h.view(5, 1, 6), second)
    return one.sum() + other.square().sum()


def gradients(loss: Tensor, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x, *readers.weights]))  # type: ignore[attr-defined]


@pytest.mark.parametrize("inside", ["plain", "view", "checkpoint", "recomputed"])
def test_readers_get_the_same_bits(inside: str) -> None:
    def compute(x: Tensor, again: bool) -> Tensor:
        if inside == "recomputed" and again:
            h = recomputed(lambda v: Square.apply(v)[0], x)
        else:
            h = Square.apply(x)[0]
        if inside == "view":
            h = h.view(1, 5, 6).flatten(0, 1)
        return readers(h, again)

    found = []
    for again in (False, True):
        x = draw()
        if inside == "checkpoint":
            loss = checkpoint(compute, x, again, use_reentrant=False)
        else:
            loss = compute(x, again)
        found.append(gradients(loss, x))
    for plain, remade in zip(*found, strict=True):
        assert torch.equal(plain, remade)
    assert Square.made == (inside in ("plain", "view"))  # for both readers


def test_what_was_made_is_let_go_after_its_last_reader() -> None:
    x = draw()
    h = Square.apply(x)[0]
    loss = readers(h, again=True)
    alive: list[bool] = []
    h.register_hook(lambda gradient: alive.append(hasattr(h.grad_fn, "made")))
    loss.backward()
    assert alive == [False] and Square.made == 1


@pytest.mark.parametrize("how", ["kept", "made", "recomputed"])
def test_its_memory_is_given_back(how: str) -> None:
    x = draw()
    h = recomputed(torch.sigmoid, x) if how == "recomputed" else Square.apply(x)[0]
    loss = readers(h, again=how != "kept")
    kept = {tensor.data_ptr() for tensor in saved_tensors(loss.grad_fn)}
    assert {weight.data_ptr() for weight in readers.weights} <= kept  # type: ignore[attr-defined]
    assert (h.data_ptr() in kept) == (how == "kept")


def saved_tensors(node: Any) -> list[Tensor]:
    """All that the graph behind a node keeps as it is."""
    found: list[Any] = []
    seen, nodes = {None}, [node]
    while nodes:
        if (node := nodes.pop()) in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                raw = getattr(node, name)
                found += [part.data for part in (raw if isinstance(raw, tuple) else [raw])]
    found = [part.value if isinstance(part, again_module.Saved) else part for part in found]
    return [part for part in found if isinstance(part, Tensor)]


def test_only_the_first_output_is_made_again() -> None:
    first, second = Square.apply(draw())
    assert find_maker(first) is first.grad_fn and find_maker(first.view(30)) is first.grad_fn
    assert find_maker(second) is None and find_maker(first + 1) is None
    assert find_maker(draw()) is None and find_maker(torch.zeros(2)) is None


def test_columns_and_slices() -> None:
    """A reader that keeps them keeps where their elements are."""
    found = []
    for again in (False, True):
        x, weight = draw(), weights()[0]
        h = Square.apply(x)[0]
        with made_again(h) if again else nullcontext():
            loss = (h.mT @ weight[:5]).square().sum() + (h[1:4, 2:] * h[:3, :4]).sum()
        assert (h.data_ptr() in {t.data_ptr() for t in saved_tensors(loss.grad_fn)}) != again
        found.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*found)


class Corner(Square):
    """The same in a part of a larger memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.make_again = Square.make_again
        return torch.cat([x * x, x])[: len(x)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def test_a_part_of_a_memory_is_kept() -> None:
    """What is made again would have no other elements."""
    x, weight = draw(), weights()[0]
    h = Corner.apply(x)
    assert find_maker(h) is not None
    with made_again(h):
        y = h @ weight
    assert h.data_ptr() in {kept.data_ptr() for kept in saved_tensors(y.grad_fn)}


def test_only_what_draws_nothing_is_computed_again() -> None:
    """A second dropout would be another one."""
    peft = pytest.importorskip("peft")
    fused = pytest.importorskip("ssm_train.peft.fused_lora").FusedLoraLinear
    for layer in (nn.Linear(6, 6), modules.Fp32BiasLinear(6, 6)):
        assert modules.draws_nothing(layer.train())
    base = nn.Sequential(OrderedDict(proj=nn.Linear(6, 6)))
    for dropout in (0.0, 0.5):
        config = peft.LoraConfig(r=2, target_modules=["proj"], lora_dropout=dropout)
        layer = peft.inject_adapter_in_model(config, deepcopy(base)).proj
        layer.__class__ = fused
        assert modules.draws_nothing(layer.train()) == (dropout == 0)
    config = peft.LoKrConfig(r=2, target_modules=["proj"], rank_dropout=0.5)
    assert not modules.draws_nothing(peft.inject_adapter_in_model(config, deepcopy(base)).proj)


@pytest.mark.parametrize("how", ["made", "recomputed"])
def test_a_checkpoint_sees_all_that_is_kept(how: str) -> None:
    """Hooks inside its own would keep for it what they do not make again."""
    packed: list[int] = []

    def compute(x: Tensor) -> Tensor:
        h = recomputed(torch.sigmoid, x) if how == "recomputed" else Square.apply(x)[0]
        return readers(h, again=True)

    x = draw()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda kept: packed.append(kept.data_ptr()) or kept, lambda kept: kept
    ):
        loss = compute(x)
    assert {weight.data_ptr() for weight in readers.weights} <= set(packed)  # type: ignore[attr-defined]
    loss.backward()
    assert Square.made == 0


def test_without_a_backward_pass_nothing_stays() -> None:
    """Not even what a reader keeps of its own output."""
    h = Square.apply(draw())[0]
    with made_again(h):
        y = (h * 2).exp()
    node = weakref.ref(h.grad_fn)
    del h, y
    assert node() is None


@pytest.mark.parametrize("how", ["made", "recomputed"])
def test_what_was_changed_meanwhile_is_an_error(how: str) -> None:
    """As PyTorch has it, which does not look where hooks are."""
    first, _ = weights()
    h = recomputed(lambda v: v @ first, draw(), weights=[first])
    if how == "made":
        h = Square.apply(draw())[0]
        with made_again(h):
            h = h @ first
    with torch.no_grad():
        first.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        h.square().sum().backward()


def test_a_value_that_was_written_into_is_kept() -> None:
    """Its maker would make what it was before."""
    h, weight = Square.apply(draw())[0], weights()[0]
    with torch.no_grad():
        h.mul_(3)
    with made_again(h):
        y = h @ weight
    expected = h.detach().sum(0)[:, None].expand(6, 6)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), weight)[0], expected)


def test_without_gradients_there_is_nothing_to_make() -> None:
    """Inference tensors have no versions to ask for."""
    weight = weights()[0].detach()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            h = recomputed(torch.tanh, draw(), weights=[weight])
            with made_again(h, Square.apply(h)[0]):
                assert (h @ weight).isfinite().all()


def test_twice_backwards() -> None:
    x = draw()
    loss = readers(recomputed(torch.tanh, x), again=True)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


# ---------------------------------------------------------------- whole models

MODELS: dict[str, dict[str, Any]] = {
    "gla": {"model_type": "gla", "hidden_size": 256, "num_heads": 2, "intermediate_size": 512},
    "mamba": {"model_type": "mamba", "hidden_size": 128, "state_size": 16},
    "mamba2": {
        "model_type": "mamba2", "hidden_size": 128, "num_heads": 8, "head_dim": 32, "n_groups": 1,
        "state_size": 64,
    },
}  # fmt: skip
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 97}


def train_once(family: str, recompute: Any) -> tuple[int, int, list[Tensor]]:
    """Bytes that are there at the end of the forward pass, those that the backward pass leaves, and
    the gradients of all weights."""
    torch.manual_seed(0)
    config = MODELS[family] | SPECIAL | {"num_hidden_layers": 4}
    spec = ModelSpec(new_model=config, gradient_checkpointing=recompute, device="cuda")
    model: Any = registry.resolve(spec)[0].prepare(spec).model.train()
    ids = torch.randint(3, 97, (1, 2048), device="cuda")
    cu_seqlens = torch.tensor([0, 700, 701, 1500, 2048], dtype=torch.int32, device="cuda")
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(ids, labels=ids, use_cache=False, cu_seqlens=cu_seqlens).loss
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    results = [loss.detach(), *(p.grad for p in model.parameters())]
    left = torch.cuda.memory_allocated() - before - sum(x.nbytes for x in results)
    return kept, left, results


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("recompute", [False, "mixer", True])
def test_models_keep_less_and_learn_the_same(
    family: str, recompute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "mamba2":
        pytest.importorskip("mamba_ssm", reason="Mamba-2's kernels are mamba_ssm's")
    train_once(family, recompute)  # kernels are tuned, and libraries take what they work in
    less, left, found = train_once(family, recompute)
    assert left < 2**20, "the backward pass leaves something"
    monkeypatch.setattr(again_module, "find_maker", lambda x: None)
    monkeypatch.setattr(modules, "recomputed", lambda function, x: function(x))
    kept, _, expected = train_once(family, recompute)
    assert less < (0.8 if recompute is False else 1.01) * kept, (less, kept)
    for got, wanted in zip(found, expected, strict=True):
        error = (got - wanted).norm() / wanted.norm()
        assert error <= (1e-3 if family == "mamba2" else 0)  # mamba_ssm adds up in any order
