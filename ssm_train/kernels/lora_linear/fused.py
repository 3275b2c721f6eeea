"""LoRA layers over one input with one saved input, one product with all A, and no gradient of a
frozen base weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_train.kernels.lora_linear.reference import LoraLinear


def lora_linears(
    x: Tensor,
    layers: Sequence[LoraLinear],
    *,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """x [..., in] -> one [..., out] a layer, in `dtype` (None: that of x), which is the dtype of
    all products; factors and gradients of factors keep their own.

    `dropout` is the probability that an element of A's input is zero: one mask for all layers.
    """
    tensors = [tensor for layer in layers for tensor in layer[:4]]
    scalings = [layer.scaling for layer in layers]
    shape = x.shape
    outputs = LoraLinears.apply(x.flatten(0, -2), scalings, dropout, dtype or x.dtype, *tensors)
    return tuple(y.unflatten(0, shape[:-1]) for y in outputs)


class LoraLinears(torch.autograd.Function):
    """Over rows x [T, in]; `tensors`: weight, bias, A and B of each layer."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any,
        x: Tensor,
        scalings: list[float],
        dropout: float,
        dtype: torch.dtype,
        *tensors: Tensor | None,
    ):
        weights, biases, As, Bs = (tensors[i::4] for i in range(4))
        ctx.dtype_of_x, ctx.scalings = x.dtype, scalings
        ctx.ranks = [A.shape[0] for A in As]  # type: ignore[union-attr]
        ctx.dtype_of_A = As[0].dtype  # type: ignore[union-attr]
        x = x.to(dtype)
        keep, a_input = None, x
        if dropout:  # the kept elements, scaled, and which they are
            a_input, keep = torch.native_dropout(x, dropout, True)
            ctx.kept_scale = 1 / (1 - dropout)
        A, rows = prepare(As, Bs, scalings, dtype)
        a_outputs = a_input @ A.mT  # [T, R]
        outputs = []
        for weight, bias, B, a in zip(
            weights, biases, rows, a_outputs.split(ctx.ranks, 1), strict=True
        ):
            y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))  # type: ignore[union-attr]
            outputs.append(y.addmm_(a, B.mT))
        ctx.save_for_backward(x, keep, A, a_outputs, *rows, *weights)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):  # type: ignore[no-untyped-def]
        count = len(gradients)
        x, keep, A, a_outputs, *others = ctx.saved_tensors
        rows, weights = others[:count], others[count:]
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        gradients = tuple(dy.to(x.dtype).contiguous() for dy in gradients)

        da = torch.cat([dy @ B for dy, B in zip(gradients, rows, strict=True)], 1)  # [T, R]
        dA = dx = None
        if any(needs[2::4]):
            a_input = x if keep is None else x * keep * ctx.kept_scale
            dA = scale_parts(da.mT @ a_input, ctx.ranks, ctx.scalings, ctx.dtype_of_A)
            dA = dA.split(ctx.ranks)
        if needs_x:
            dx = gradients[0] @ weights[0].to(x.dtype)
            for dy, weight in zip(gradients[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight.to(x.dtype))
            if keep is None:
                dx.addmm_(da, A)
            else:
                dx.addcmul_(da @ A, keep.to(x.dtype), value=ctx.kept_scale)
            dx = dx.to(ctx.dtype_of_x)
        found: list[Tensor | None] = []
        for i, (dy, a) in enumerate(zip(gradients, a_outputs.split(ctx.ranks, 1), strict=True)):
            needs_weight, needs_bias, needs_A, needs_B = needs[4 * i : 4 * i + 4]
            found += [
                dy.mT @ x if needs_weight else None,
                dy.sum(0) if needs_bias else None,
                dA[i] if needs_A else None,  # type: ignore[index]
                dy.mT @ a if needs_B else None,
            ]
        return dx, None, None, None, *found


Factors = tuple[Tensor, list[Tensor]]
held: ContextVar[dict[tuple[Any, ...], Factors] | None] = ContextVar("held", default=None)
"""What `prepare` has made of each group of factors, inside `constant_factors`; each thread has its
own."""


@contextmanager
def constant_factors() -> Iterator[None]:
    """Inside, no factor changes: what a product reads of them is made once. For decoding, where
    that would be a third of the kernels of each token."""
    token = held.set({})
    try:
        yield
    finally:
        held.reset(token)


def prepare(
    As: Sequence[Any], Bs: Sequence[Any], scalings: Sequence[float], dtype: torch.dtype
) -> Factors:
    """What products read: all A, each times its scaling [R, in], and each B [out, r]."""
    known = held.get()
    key = (dtype, *scalings, *(factor.data_ptr() for factor in (*As, *Bs)))
    if known is not None and key in known:
        return known[key]
    made = stack(As, scalings, dtype), [B.to(dtype) for B in Bs]
    if known is not None:
        known[key] = made
    return made


def stack(As: Sequence[Any], scalings: Sequence[float], dtype: torch.dtype) -> Tensor:
    """[R, in]: all A, each times its scaling."""
    return scale_parts(torch.cat(list(As)), [A.shape[0] for A in As], scalings, dtype)


def scale_parts(
    rows: Tensor, ranks: list[int], scalings: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """rows [R, in], each part of `ranks` rows times its scaling, in `dtype`: one operation where
    all have the same."""
    if len(set(scalings)) == 1:
        return torch.mul(rows, scalings[0], out=torch.empty_like(rows, dtype=dtype))
    parts = zip(rows.split(ranks), scalings, strict=True)
    return torch.cat([part * scaling for part, scaling in parts]).to(dtype)


@torch.no_grad()
def row_norms(layer: LoraLinear, squares: Tensor) -> Tensor:
    """`reference.row_norms` without the matrix, in fp32 or more: `squares` [out] are the square
    norms of the rows of the weight, which a frozen one has once and for all."""
    weight, A, B, s = (
        layer.weight,
        layer.A.to(squares.dtype),
        layer.B.to(squares.dtype),
        layer.scaling,
    )
    with torch.autocast(weight.device.type, enabled=False):
        along = (weight @ A.mT.to(weight.dtype)).to(squares.dtype)  # [out, r]
        total = squares + 2 * s * (along * B).sum(1) + s**2 * ((B @ (A @ A.mT)) * B).sum(1)
    return total.clamp_min(0).sqrt()
