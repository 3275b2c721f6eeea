"""What a PEFT method reached: how many of the model's linear layers and parameters, and which."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from ssm_train.peft.lora import lora_layers
from ssm_train.peft.targets import find_head
from ssm_train.peft.tuner import own_layers


@dataclass(frozen=True)
class Coverage:
    """Counts of adapted layers and trainable parameters. `str()` is one line for the log."""

    method: str
    """LoRA, or the peft_type of one of our own methods."""
    ranks: tuple[int, ...]
    adapted: int
    """Layers that the method sits on."""
    linear_layers: int
    """Linear layers of the model, adapted or not, without the output head unless adapted."""
    trainable: int
    parameters: int
    """All parameters, the adapter's included."""
    patterns: dict[str, int]
    """Module name with `*` for the layer number -> adapted layers of that name."""

    def __str__(self) -> str:
        rank = "/".join(str(r) for r in self.ranks)
        where = (
            f"LoRA r={rank} on {self.adapted} of {self.linear_layers} linear layers of the mixers "
            "and MLPs"
            if self.ranks
            else f"{self.method} at {self.adapted} place{'s' if self.adapted > 1 else ''} "
            f"({', '.join(self.patterns)})"
        )
        return (
            f"{where}, {count_text(self.trainable)} of {count_text(self.parameters)} parameters "
            f"({self.trainable / max(self.parameters, 1):.1%})"
        )


def measure_coverage(model: nn.Module) -> Coverage:
    """Counts what is adapted in a model after injection. Sharded parameters count in full."""
    own = own_layers(model)
    layers: dict[str, Any] = own or lora_layers(model)
    head = find_head(model)
    inside = tuple(f"{name}." for name in layers)
    untouched = sum(
        isinstance(module, nn.Linear) and module is not head and not name.startswith(inside)
        for name, module in model.named_modules()
    )
    trainable, parameters = count_parameters(model)
    patterns = Counter(
        re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model.")) for name in layers
    )
    ranks = () if own else sorted({r for layer in layers.values() for r in layer.r.values()})
    configs = getattr(model, "peft_config", {})
    return Coverage(
        method=configs["default"].peft_type.value if own else "LoRA",
        ranks=tuple(ranks),
        adapted=len(layers),
        linear_layers=len(layers) + untouched,
        trainable=trainable,
        parameters=parameters,
        patterns=dict(patterns),
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(those that train, all). Sharded parameters count in full."""
    sizes = [(_size(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def count_text(count: int) -> str:
    """412 -> "412", 41_200 -> "41.2 K", 4_120_000 -> "4.12 M"."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return (
                f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count // unit} {name}"
            )
    return str(count)


def _size(parameter: nn.Parameter) -> int:
    # ZeRO-3 leaves an empty tensor behind and remembers the number of elements.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
