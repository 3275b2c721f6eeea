"""Values that cost little to make: the backward pass makes them again, and they are not kept for
it. A Function that makes one says how (`ctx.make_again`), who reads it that it may (`made_again`).
Inside a checkpoint none of this happens: all is computed again there anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

VIEWS = ("ViewBackward0", "UnsafeViewBackward0")
"""Nodes behind which all elements lie as before."""


class Place(NamedTuple):
    """What was to be kept: elements of a value that `maker` makes."""

    maker: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any  # elements


class Saved(NamedTuple):
    """What is kept, and PyTorch's count of how often it had been written into."""

    value: Tensor
    version: int


def made_again(*values: Tensor) -> AbstractContextManager[Any]:
    """Inside, nothing keeps the values for its backward pass, or slices of them, but how they are
    made, where their makers say so. It is for calls that nothing else is made again in.

    The maker is the node of a Function whose ctx has `make_again`: given the ctx it returns the
    Function's first output once more, bit for bit.
    """
    if others_keep():
        return nullcontext()
    makers = {
        (x.untyped_storage().data_ptr(), x.dtype): maker
        for x in values
        if (maker := find_maker(x)) is not None and fills_its_memory(x)
    }

    def pack(x: Tensor) -> Saved | Place:
        maker = makers.get((x.untyped_storage().data_ptr(), x.dtype))
        if maker is None:  # an output itself would hold its own node
            return Saved(x if x.is_leaf else x.detach(), x._version)
        maker.readers = maker.unread = getattr(maker, "readers", 0) + 1
        return Place(maker, x.size(), x.stride(), x.storage_offset())

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack) if makers else nullcontext()


def unpack(kept: Saved | Place) -> Tensor:
    if isinstance(kept, Saved):
        check_unchanged([kept.value], [kept.version])
        return kept.value
    maker = kept.maker
    made: Tensor = vars(maker).pop("made", None)
    if made is None:
        made = maker.make_again(maker)
    maker.unread = (maker.unread or maker.readers) - 1
    if maker.unread:  # for the others
        maker.made = made
    return made.as_strided(kept.size, kept.stride, kept.offset)


def find_maker(x: Tensor) -> Any:
    """The node that makes x, or that of which x is a view; None: it cannot do so again, or x was
    written into since."""
    if x.grad_fn is None or x._version:
        return None
    node, output = x.grad_fn, x.output_nr
    while node is not None and node.name() in VIEWS:
        node, output = node.next_functions[0]  # type: ignore[assignment]
    return node if output == 0 and hasattr(node, "make_again") else None


def fills_its_memory(x: Tensor) -> bool:
    return x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size() > 0


def others_keep() -> bool:
    """Whether a checkpoint, or somebody else's hooks, decide what is kept. They do not see what is
    kept by ours, which would hold all the rest for them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def check_unchanged(tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    """PyTorch looks at this itself only where nobody's hooks are at work."""
    if any(t._version != version for t, version in zip(tensors, versions, strict=True)):
        raise RuntimeError(
            "a tensor that the backward pass needs was changed in place after the forward pass"
        )


def recomputed(
    function: Callable[..., Tensor], *inputs: Tensor, weights: Iterable[Tensor] = ()
) -> Tensor:
    """function(*inputs), which `made_again` may compute again from the inputs; so may its own
    backward pass, which keeps nothing else. The function reads `weights` and draws no random
    numbers."""
    if others_keep() or not torch.is_grad_enabled():
        return function(*inputs)
    read = (*inputs, *weights)
    versions = [tensor._version for tensor in read]

    def compute(*values: Tensor) -> Tensor:
        check_unchanged(read, versions)
        result: Tensor = Remembered.apply(function(*values))
        return result

    result: Tensor = checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


class Remembered(torch.autograd.Function):
    """x -> x, saved in a checkpoint, where asking for it computes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.make_again = lambda ctx: ctx.saved_tensors[0]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
