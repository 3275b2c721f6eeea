"""Each GPU's share of a model under every engine, and what it sends: counted from the model's
parameters, as engines really keep and send them (`tests/parallel/test_traffic.py`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ssm_train.engines.fsdp import find_layers, main_dtype
from ssm_train.engines.zero_config import AUTO, BUCKET, fill_sizes
from ssm_train.peft.targets import find_head

ZERO_3_LIMITS = tuple(
    f"stage3_{name}"
    for name in ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")
)


@dataclass(frozen=True)
class Weights:
    """Bytes of some parameters as they are stored. Trained ones are fp32."""

    frozen: int = 0
    trained: int = 0

    @property
    def all(self) -> int:
        return self.frozen + self.trained

    def without(self, other: Weights) -> Weights:
        return Weights(self.frozen - other.frozen, self.trained - other.trained)


@dataclass(frozen=True)
class Model:
    """A model's parameters as engines tell them apart."""

    all: Weights
    small: Weights
    """That ZeRO-3 holds whole: gathering them would cost more than it saves."""
    odd: Weights
    """That FSDP2 holds whole: of another dtype than most."""
    root: Weights
    """Of the others, outside of the repeated layers: FSDP2 keeps them gathered after forward."""
    layer: Weights
    """Of the others, in the largest repeated layer."""
    reused: float
    """Share that ZeRO-3 keeps gathered from the forward to the backward pass."""
    prefetched: float
    """Share that it gathers ahead."""
    looked_up: float = 0.0
    """Bytes of frozen embeddings, which ZeRO-3 does not gather for the backward pass; seen of one
    that is the head too as well."""
    tied: float = 0.0
    """Bytes that ZeRO-3 gathers once more for a head that is the embedding: before the head, and
    for the embedding's gradient."""
    copies: float = 0.0
    """Bytes of trained weights in the run's precision, which autocast makes and backward reads:
    whole on each GPU, whatever the engine."""


def measure(model: nn.Module, zero_3: Mapping[str, int], copies: float = 0.0) -> Model:
    """Counts a model, on any device and before an engine has it. `zero_3`: limits in elements that
    its DeepSpeed config has in place of those of ds_configs/zero3.json."""
    parameters = list(model.parameters())
    elements = sum(p.numel() for p in parameters)
    limits = {**default_limits(parameters), **zero_3}
    persistent, distance, ahead = (limits[name] for name in ZERO_3_LIMITS)
    most = main_dtype(model)
    layers = find_layers(model)
    embeddings = find_embeddings(model)
    in_layers = {p for layer in layers for p in layer.parameters()}
    head = find_head(model)
    return Model(
        all=weigh(parameters),
        small=weigh([p for p in parameters if p.numel() <= persistent]),
        odd=weigh([p for p in parameters if p.dtype != most]),
        root=weigh([p for p in parameters if p.dtype == most and p not in in_layers]),
        layer=max(
            (weigh([p for p in layer.parameters() if p.dtype == most]) for layer in layers),
            key=lambda weights: weights.all,
            default=Weights(),
        ),
        reused=share_kept(model, distance),
        prefetched=min(1.0, ahead / elements),
        looked_up=weigh([p for p in embeddings if p.numel() > persistent]).frozen,
        tied=0.0
        if distance >= elements
        else sum(
            p.numel() * p.element_size() * (1 + p.requires_grad)
            for p in embeddings
            if p is getattr(head, "weight", None)
        ),
        copies=copies,
    )


def share_kept(model: nn.Module, distance: int) -> float:
    """Of all weights, the share that ZeRO-3 keeps gathered from the forward to the backward pass: a
    layer after which fewer than `distance` elements come. The next module that DeepSpeed meets
    there is the model itself, with all its weights."""
    elements = sum(p.numel() for p in model.parameters())
    if distance >= elements:
        return 1.0
    layers = [sum(p.numel() for p in layer.parameters()) for layer in find_layers(model)]
    embeddings = sum(p.numel() for p in find_embeddings(model))
    kept = after = elements - sum(layers) - embeddings  # norm and head
    for layer in reversed(layers):
        kept += layer if after < distance else 0
        after += layer
    return kept / elements


def find_embeddings(model: nn.Module) -> list[nn.Parameter]:
    return [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]


def default_limits(parameters: Sequence[nn.Parameter]) -> dict[str, int]:
    """What the autos of ds_configs/zero3.json become for a model: elements."""
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    widest = max(p.shape[-1] for p in parameters if p.ndim)
    autos = {"zero_optimization": dict.fromkeys(ZERO_3_LIMITS, AUTO)}
    return fill_sizes(autos, trained, widest)[0]["zero_optimization"]


def weigh(parameters: Collection[nn.Parameter]) -> Weights:
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    return Weights(sum(p.numel() * p.element_size() for p in parameters) - trained, trained)


@dataclass(frozen=True)
class Part:
    """One GPU under an engine: bytes that it holds through a step, and whole sizes in bytes of what
    an optimizer step exchanges."""

    engine: str
    weights: float
    optimizer: float
    gradients: float
    buffers: float
    """Weights and gradients of others while they are here, and copies to compute with."""
    reduced: float = 0.0
    """By all-reduce."""
    gathered: float = 0.0
    scattered: float = 0.0
    """By reduce-scatter."""
    whole: float = 0.0
    """Of an engine that holds weights in parts: the model that each GPU gathers to evaluate it,
    when gradients and buffers are gone."""

    @property
    def fixed(self) -> float:
        return self.weights + self.optimizer + self.gradients + self.buffers

    def sent(self, processes: int) -> float:
        """Bytes that each GPU sends in an optimizer step, and receives: in a ring an all-reduce
        passes every byte but a GPU's own part twice, the others once."""
        once = (processes - 1) / processes
        return once * (2 * self.reduced + self.gathered + self.scattered)


def divide(model: Model, processes: int, micro_batches: int) -> list[Part]:
    """Each engine's part, the simplest first."""
    every = model.all
    bucket = min(4 * BUCKET, every.trained)
    own = 3 * every.trained / processes  # AdamW's moments, and the fp32 copy that ZeRO updates
    return [
        Part(
            "DDP",
            weights=every.all,
            optimizer=2 * every.trained,
            gradients=every.trained,
            buffers=every.trained + model.copies,  # its reducer's buckets
            reduced=every.trained,
        ),
        Part(
            "ZeRO-1",
            weights=every.all,
            optimizer=own,
            gradients=every.trained + every.trained / processes,
            buffers=3 * bucket + model.copies,  # two that fill in turn, and the one that is sent
            reduced=every.trained,
            gathered=every.trained,
        ),
        Part(
            "ZeRO-2",
            weights=every.all,
            optimizer=own,
            gradients=2 * every.trained / processes,
            buffers=3 * bucket + model.copies,
            reduced=micro_batches * every.trained,
            gathered=every.trained,
        ),
        divide_by_fsdp(model, processes, micro_batches),
        divide_by_zero_3(model, processes, micro_batches),
    ]


def divide_by_fsdp(model: Model, processes: int, micro_batches: int) -> Part:
    parts = model.all.without(model.odd)
    accumulates = micro_batches > 1  # gradients stay whole until the last micro-batch
    two_layers = 2 * model.layer.all + (0 if accumulates else 2 * model.layer.trained)
    of_root = model.root.all + (0 if accumulates else model.root.trained)
    return Part(
        "FSDP2",
        weights=model.odd.all + parts.all / processes,
        optimizer=2 * (model.odd.trained + parts.trained / processes),
        gradients=model.odd.trained + parts.trained / (1 if accumulates else processes),
        buffers=of_root + two_layers + model.odd.trained + model.copies,
        reduced=model.odd.trained,
        gathered=micro_batches * (2 * parts.all - model.root.all),
        scattered=parts.trained,
        whole=parts.all + model.copies,
    )


def divide_by_zero_3(model: Model, processes: int, micro_batches: int) -> Part:
    parts = model.all.without(model.small)
    bucket = min(4 * BUCKET, model.all.trained)
    here = min(1.0, model.reused + model.prefetched)
    again = (parts.all - model.looked_up) * (1 - model.reused)  # for the backward pass
    return Part(
        "ZeRO-3",
        weights=model.small.all + model.all.all / processes,
        optimizer=3 * model.all.trained / processes,
        gradients=model.all.trained / processes,
        buffers=here * parts.all + 2 * bucket + model.copies,
        gathered=micro_batches * (parts.all + again + model.tied) + model.small.all,
        scattered=micro_batches * model.all.trained,
        whole=parts.all + model.copies,
    )
