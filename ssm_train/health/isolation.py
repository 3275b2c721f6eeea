"""The preflight of packed runs: documents in one row are as if each were alone. The first one's
inputs are changed, and nothing of the second may change; it has the values that it has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ssm_train.adapters.base import Batch, TokenLosses
from ssm_train.errors import InputError
from ssm_train.health.liveness import fill_zeros, unchanged
from ssm_train.parts import take_norms

LEAK = 1e-6
"""What the second document may change with the first: no more than a rounding here and there."""
FP32 = 1e-5
LOW_PRECISION = 0.1
"""How far it may be from what it is alone, where other shapes mean other roundings: of bf16, or of
TF32 inside a GPU's kernels. A state or a window that is not reset is caught by LEAK."""
WAY_OUT = "set packing: false, or packing_check: false if you know why, and report it"


def check_isolation(
    model: nn.Module,
    pair: Batch,
    alone: Batch,
    token_losses: TokenLosses,
    token_logits: Callable[[nn.Module, Batch], Tensor],
    *,
    exact: bool,
) -> None:
    """Two documents packed, `pair` with the targets of the second only, and that one `alone`.

    It runs without dropout; the model, its gradients and the RNG stay as they were. `exact`: in
    fp32 on the CPU. Raises InputError where documents touch, with the size of it.
    """
    assert pair.cu_seqlens is not None and pair.targets.equal(alone.targets)
    begin, end = pair.cu_seqlens[1:3].tolist()  # of the second document
    with unchanged(model, training=False):
        fill_zeros({name: p for name, p in model.named_parameters() if p.requires_grad})
        with _first_tokens_changed(model, begin), torch.no_grad():
            changed = token_logits(model, pair)
        with torch.no_grad():
            packed, single = token_logits(model, pair), token_logits(model, alone)
        by_input, norms = _gradients(model, pair, token_losses)
        by_own_input, own_norms = _gradients(model, alone, token_losses)
    before, within = by_input[:begin], by_input[begin:end]
    by_own_input = by_own_input[: end - begin]
    for what, leak in (
        ("logits of the second change with the first", relative_difference(changed, packed)),
        (
            "the loss of the second has gradients in the first",
            (before.norm() / within.norm()).item(),
        ),
    ):
        if not leak <= LEAK:
            raise InputError(
                f"packing: documents of one row are not apart: {what}, by {leak:.1e} of their "
                f"size; {WAY_OUT}"
            )
    for what, got, expected in (
        ("logits", packed, single),
        ("gradients", within, by_own_input),
        ("gradients of parameters", norms, own_norms),
    ):
        difference = relative_difference(got, expected)
        if not difference <= (bound := FP32 if exact else LOW_PRECISION):
            raise InputError(
                f"packing: the second document of a row has other {what} than alone, by "
                f"{difference:.1e} of their size (at most {bound:g}); {WAY_OUT}"
            )


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected; nan if one is."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@contextmanager
def _embeddings(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What the embeddings give [1, T, H] goes through `change` inside."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    hook = embeddings.register_forward_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        hook.remove()


def _first_tokens_changed(model: nn.Module, count: int) -> AbstractContextManager[None]:
    """The first tokens stand in the opposite order, with opposite signs: sizes stay."""
    return _embeddings(
        model, lambda output: torch.cat([-output[:, :count].flip(1), output[:, count:]], 1)
    )


def _gradients(model: nn.Module, batch: Batch, token_losses: TokenLosses) -> tuple[Tensor, Tensor]:
    """Of the loss: by the row's embeddings [T, H], and the norm by each trainable tensor [P]."""
    embedded: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.detach().requires_grad_())
        embedded[-1].retain_grad()
        return embedded[-1]

    with torch.enable_grad(), _embeddings(model, keep):
        token_losses(model, batch).loss.backward()
    norms = take_norms(p for p in model.parameters() if p.requires_grad)
    assert embedded[0].grad is not None
    return embedded[0].grad[0].float(), norms
