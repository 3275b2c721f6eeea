"""One cell's model, built once: a method injected into a tiny model of a family in a precision, and
trained a little. The device comes from SSM_TRAIN_TEST_DEVICE."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from typing import Any

import torch
from peft_tiny import make_batch, prepare, relative_error, tokens, train_a_little
from torch import Tensor, nn

from matrix.methods import METHODS, Json
from ssm_train import distributed
from ssm_train.adapters import common
from ssm_train.adapters.base import Batch, LossSum, Prepared
from ssm_train.optim import same_rate
from ssm_train.peft.sd_lora import SdLoraMethod
from ssm_train.peft.spec import load_peft

DEVICE = torch.device(os.environ.get("SSM_TRAIN_TEST_DEVICE", "cpu"))
BOUND = 1e-5
"""fp32: largest difference, relative to the largest value."""


class Cell:
    """A method on a model of a family in a precision: the base's logits, the model as the method
    left it, and the model after some training. Raises InputError where the two do not go together.

    bf16 is what a run makes of it: frozen weights stored in bf16, trained ones in fp32, autocast.
    """

    def __init__(self, name: str, family: str, prec: distributed.Precision) -> None:
        self.method, self.family, self.prec = METHODS[name], family, prec
        self.settings = self.method.settings_of(family)
        frozen = self.settings is not None
        self.storage = torch.bfloat16 if frozen and prec == "bf16" else torch.float32
        self.ids = tokens(2, 19).to(DEVICE)

        prepared = prepare(family, dtype=self.storage)
        on_device(prepared.model)
        self.base_logits = self.logits(prepared.model)
        self.exact_base_logits = exact_logits(prepared.model, self.ids)
        method = inject(prepared, self.settings, self.token_losses)
        self.initial: dict[str, Tensor] = getattr(method, "initial", {})
        """A and B as they started, where that changed the base."""
        self.lr_scale = getattr(method, "lr_scale", same_rate)
        self.values_at_start = {k: p.detach().clone() for k, p in trainable(prepared.model).items()}
        train_a_little(prepared.model, seed=5, scale=0.04)
        prepared.model.eval()
        self.trained = prepared

    # ------------------------------------------------------------ what the model computes

    def forward(self, model: nn.Module, **inputs: Any) -> Any:
        with distributed.autocast(self.prec, DEVICE):
            return model(**inputs)

    @torch.no_grad()
    def logits(self, model: nn.Module, ids: Tensor | None = None) -> Tensor:
        return self.forward(
            model.eval(), input_ids=self.ids if ids is None else ids, use_cache=False
        ).logits.float()

    def token_losses(self, model: nn.Module, batch: Batch) -> LossSum:
        with distributed.autocast(self.prec, DEVICE):
            return common.token_losses(model, batch)

    @cached_property
    def exact(self) -> nn.Module:
        """The trained model with the same values, all in fp32."""
        return in_fp32(self.trained.model)

    @cached_property
    def trained_logits(self) -> Tensor:
        return self.logits(self.trained.model)

    @cached_property
    def exact_trained_logits(self) -> Tensor:
        return exact_logits(self.exact, self.ids)

    @contextmanager
    def at_start(self) -> Iterator[nn.Module]:
        """The model with the values that it had before any training."""
        values = trainable(self.trained.model)
        trained = {name: p.detach().clone() for name, p in values.items()}
        set_values(values, self.values_at_start)
        try:
            yield self.trained.model
        finally:
            set_values(values, trained)

    # ------------------------------------------------------------ how far off it may be

    def error(self, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """fp32: the largest difference in a tensor, relative to its largest value. bf16: the root
        mean square relative to that of the tensor, over the tensors: rounding is noise, of which
        the largest says little. inf where it is no number."""
        pairs = [*zip(actual, expected, strict=True)]
        if self.prec == "fp32":
            errors = [relative_error(a.float(), e) for a, e in pairs]
            return max(error if error == error else float("inf") for error in errors)
        squares = [((a.float() - e).norm() / e.norm()).item() ** 2 for a, e in pairs]
        found = (sum(squares) / len(squares)) ** 0.5
        return found if found == found else float("inf")


def on_device(model: nn.Module) -> nn.Module:
    return model.to(DEVICE)


def in_fp32(model: nn.Module) -> nn.Module:
    """The model itself where it is stored so, else a copy."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    return copy.deepcopy(model).float()


@torch.no_grad()
def exact_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return in_fp32(model).eval()(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def set_values(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def inject(prepared: Prepared, settings: Json | None, token_losses: Any) -> Any:
    """What a run does before its loop, a short warm-up included; returns the method."""
    if settings is None:
        prepared.model.requires_grad_(True)
        return None
    spec = load_peft(settings)
    assert spec is not None
    method: Any = spec.make()
    method.inject(prepared)
    method.calibrate(prepared, examples(), token_losses)
    if isinstance(method, SdLoraMethod):
        train_a_little(prepared.model, seed=7)
        method.begin_training(prepared, method.select(prepared.model))
    return method


def examples() -> Iterator[Batch]:
    """One example a batch, of several lengths, without an end."""
    return (make_batch(1, 9 + k % 5, seed=20 + k).to(DEVICE) for k in count())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
