"""What a run needs of each GPU, and what each GPU sends, under every engine: counted from the
model's parameters, as engines really keep and send them (`tests/parallel/test_traffic.py`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ssm_train.config import RunConfig
from ssm_train.engines.fsdp import find_layers, main_dtype
from ssm_train.engines.zero_config import AUTO, BUCKET, fill_sizes
from ssm_train.peft.targets import find_head
from ssm_train.plan import GIB, ROOM, Plan, gib, shape_run

GB = 1e9  # of what is sent; memory is in GiB
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


# ---------------------------------------------------------------- one GPU under each engine


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


# ---------------------------------------------------------------- what the command says


@dataclass(frozen=True)
class Cluster:
    """GPUs that train together."""

    gpus: int
    memory: float  # bytes of each
    bandwidth: float | None = None  # bytes/s that each sends over the slowest link it uses
    step_seconds: float | None = None  # of a step on one GPU


@dataclass(frozen=True)
class Outlook:
    """A run on a cluster."""

    cluster: Cluster
    plan: Plan
    model: Model
    parts: list[Part]
    """Of each engine, the simplest first."""

    def peak(self, part: Part) -> float:
        """Bytes: in training with what layers keep for a row and the logits, or in an evaluation
        where that takes more."""
        plan = self.plan
        step = part.fixed + plan.tokens * (plan.per_token + plan.recomputed) + plan.logits
        return max(step, part.weights + part.optimizer + part.whole)

    def fits(self, part: Part) -> bool:
        return self.peak(part) <= ROOM * self.cluster.memory

    def seconds(self, part: Part) -> float | None:
        if self.cluster.bandwidth is None:
            return None
        return part.sent(self.cluster.gpus) / self.cluster.bandwidth


def look_ahead(cfg: RunConfig, plan: Plan, cluster: Cluster) -> Outlook:
    """`plan`: of the same run. Raises InputError for what `make_plan` cannot count either."""
    _, prepared = shape_run(cfg)
    copies = plan.training - 8 * plan.trained
    model = measure(prepared.model, {}, copies)
    parts = divide(model, cluster.gpus, cfg.gradient_accumulation_steps)
    return Outlook(cluster, plan, model, parts)


def describe(outlook: Outlook) -> Iterator[str]:
    """The lines of `ssm-train plan --gpus`."""
    cluster, gpus = outlook.cluster, outlook.cluster.gpus
    yield f"on {gpus:,} GPUs, GiB on each (of {gib(cluster.memory)}) and GB that each sends a step"
    yield (
        f"{'engine':<8}{'weights':>9}{'optimizer':>11}{'gradients':>11}{'buffers':>9}{'peak':>9}"
        f"{'sent':>9}{'ms':>8}{'of step':>9}"
    )
    for part in outlook.parts:
        seconds, compute = outlook.seconds(part), cluster.step_seconds
        milliseconds = "" if seconds is None else f"{1000 * seconds:.1f}"
        share = "" if seconds is None or compute is None else f"{seconds / compute:.0%}"
        held = (part.weights, part.optimizer, part.gradients, part.buffers, outlook.peak(part))
        columns = zip(held, (9, 11, 11, 9, 9), strict=True)
        line = part.engine.ljust(8) + "".join(f"{b / GIB:>{width}.2f}" for b, width in columns)
        yield f"{line}{part.sent(gpus) / GB:>9.3f}{milliseconds:>8}{share:>9}".rstrip()
    yield from advise(outlook)


def advise(outlook: Outlook) -> Iterator[str]:
    """The simplest engine that fits, and what parts of frozen weights would cost."""
    fitting = [part for part in outlook.parts if outlook.fits(part)]
    if not fitting:
        yield "no engine fits: set gradient_checkpointing, or smaller rows"
        return
    yield f"advice  {fitting[0].engine}: the simplest that fits"
    every, cluster = outlook.model.all, outlook.cluster
    if fitting[0].engine in ("DDP", "ZeRO-1", "ZeRO-2") and every.frozen > every.trained:
        yield warn_of_parts(
            "ZeRO-3 or FSDP2", every.frozen, every.trained, cluster.gpus, cluster.bandwidth
        )


def warn_of_parts(
    engine: str, frozen: float, trained: float, processes: int, bandwidth: float | None = None
) -> str:
    """What an engine that holds weights in parts sends for frozen ones, where they would fit whole.
    Bytes, and bytes/s that a GPU sends; None: not known."""
    once = (processes - 1) / processes
    sent = 2 * frozen * once
    time = "" if bandwidth is None else f", {1000 * sent / bandwidth:.1f} ms"
    return (
        f"{engine} gathers frozen weights for nothing: each process sends up to "
        f"{sent / GB:.3f} GB in a micro-batch{time}; under DDP they are whole, and it sends "
        f"{2 * trained * once / GB:.3f} GB in a step"
    )
