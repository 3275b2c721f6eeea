"""PEFT's LoRA layer by our fused op: in one with the layers that read the same input, and without
the copies of the input that PEFT makes for fp32 factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor, nn

from ssm_train.adapters.common import (
    Fp32BiasLinear,
    autocasts,
    compute_dtype,
    has_hooks,
    is_plain_linear,
)
from ssm_train.kernels.lora_linear import LoraLinear, lora_linears


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
        return [layer._finish(y) for layer, y in zip(layers, outputs, strict=True)]

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
        inside = (self.lora_A[adapter], self.lora_B[adapter], self.lora_dropout[adapter])
        if any(has_hooks(module) for module in inside):
            return False
        factor: Any = self.lora_A[adapter].weight
        return autocasts(x) or x.dtype == self.base_layer.weight.dtype == factor.dtype

    def _adapter(self) -> str | None:
        """The one plain LoRA adapter that counts now; None where it is another case."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name: str = self.active_adapters[0]
        plain = name in self.lora_A and name not in self.lora_variant and not self.lora_bias[name]
        return name if plain else None

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
            None if type(base) is Fp32BiasLinear else base.bias,
            A.weight,
            B.weight,
            self.scaling[name],
        )

    def _finish(self, y: Tensor) -> Tensor:
        base = self.base_layer
        return base.add_bias(y) if isinstance(base, Fp32BiasLinear) else y
