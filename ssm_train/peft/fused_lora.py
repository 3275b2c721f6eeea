"""PEFT's LoRA layer by our fused op: in one with the layers that read the same input, and without
the copies of the input that PEFT makes for fp32 factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ssm_train.adapters.modules import (
    Fp32BiasLinear,
    autocasts,
    compute_dtype,
    has_hooks,
    is_plain_linear,
)
from ssm_train.kernels.lora_linear import LoraLinear, lora_linears, row_norms


class FusedLoraLinear(Linear):
    """Same parameters, same function, same names. What the op does not know (several adapters at
    once, hooks inside, sharded weights, ...) goes PEFT's way."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        if args or options or not self._fuses(x):
            return super().forward(x, *args, **options)
        return self.forward_together([self], x)[0]

    @staticmethod
    def forward_together(layers: Sequence[FusedLoraLinear], x: Tensor) -> list[Tensor]:
        """Outputs of layers with the same input; x [..., in] -> [..., out] each."""
        own = [layer._lora_linear() for layer in layers]
        dropout = layers[0]._dropout()
        outputs = lora_linears(x, own, dropout=dropout, dtype=compute_dtype(x))
        return [
            layer._finish(y, weights)
            for layer, y, weights in zip(layers, outputs, own, strict=True)
        ]

    def joins(self, other: nn.Module, x: Tensor) -> bool:
        """Whether both layers, of the same input, can be one operation."""
        return (
            isinstance(other, FusedLoraLinear)
            and not (has_hooks(self) or has_hooks(other))
            and self._fuses(x)
            and other._fuses(x)
            and self._dropout() == other._dropout()
        )

    def _fuses(self, x: Tensor) -> bool:
        adapter = self._adapter()
        if adapter is None or not is_plain_linear(self.base_layer):
            return False
        parts = (self.lora_A, self.lora_B, self.lora_dropout, self.lora_magnitude_vector)
        if any(has_hooks(part[adapter]) for part in parts if adapter in part):
            return False
        factor: Any = self.lora_A[adapter].weight
        return autocasts(x) or x.dtype == self.base_layer.weight.dtype == factor.dtype

    def _adapter(self) -> str | None:
        """The one adapter that counts now, if it is plain LoRA or DoRA; None: another case. PEFT's
        DoRA with dropout is no function of the outputs of both."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name: str = self.active_adapters[0]
        if name not in self.lora_A or self.lora_bias[name]:
            return None
        variant = self.lora_variant.get(name)
        dora = isinstance(variant, DoraLinearVariant) and not self._dropout()
        return name if variant is None or dora else None

    def _dropout(self) -> float:
        dropout = self.lora_dropout[self.active_adapters[0]]
        return dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0

    def _lora_linear(self) -> LoraLinear:
        name = self.active_adapters[0]
        base: Any = self.base_layer
        A: Any = self.lora_A[name]
        B: Any = self.lora_B[name]
        return LoraLinear(
            base.weight,
            None if self._adds_bias_later else base.bias,
            A.weight,
            B.weight,
            self.scaling[name],
        )

    @property
    def _has_magnitudes(self) -> bool:
        return self.active_adapters[0] in self.lora_magnitude_vector

    @property
    def _adds_bias_later(self) -> bool:
        return type(self.base_layer) is Fp32BiasLinear or self._has_magnitudes

    def _finish(self, y: Tensor, layer: LoraLinear) -> Tensor:
        """What comes after base and LoRA: DoRA's magnitudes, and a bias that waited for them."""
        base: Any = self.base_layer
        dtype = y.dtype
        if self._has_magnitudes:
            magnitude: Any = self.lora_magnitude_vector[self.active_adapters[0]]
            y = y * (magnitude.weight / row_norms(layer, self._squares()))  # in fp32
        if isinstance(base, Fp32BiasLinear):
            return base.add_bias(y)
        if self._adds_bias_later and base.bias is not None:
            y = y + base.bias
        return y.to(dtype)

    def _squares(self) -> Tensor:
        """Square norms of the rows of the base weight, computed again where it has changed."""
        weight: Any = self.base_layer.weight
        state = weight.data_ptr(), weight._version
        # Trained ones always: DeepSpeed changes them where no version counts.
        if weight.requires_grad or getattr(self, "_squares_of", None) != state:
            with torch.no_grad():
                self._squares_found = weight.float().square().sum(1)
            self._squares_of = state
        return self._squares_found
