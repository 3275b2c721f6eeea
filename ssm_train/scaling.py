"""A run on a cluster, under every engine: whether it fits, what crosses, and which one to take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ssm_train.config import RunConfig
from ssm_train.plan import GIB, ROOM, Plan, gib, shape_run
from ssm_train.shares import Model, Part, divide, measure

GB = 1e9  # of what is sent; memory is in GiB


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
        step = part.fixed + plan.of_row(plan.tokens)
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
