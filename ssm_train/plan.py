"""What a run will need of a GPU's memory, counted before it starts: no GPU is needed.

Peak = weights + what is trained and its optimizer + what layers keep for a row's tokens + logits.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ssm_train import distributed, graphs
from ssm_train.adapters import registry
from ssm_train.adapters.base import Kept, ModelAdapter, ModelSpec, Prepared
from ssm_train.assemble import STORAGE
from ssm_train.config import RunConfig
from ssm_train.errors import InputError
from ssm_train.loss import LOGITS_AT_ONCE
from ssm_train.peft.spec import load_peft
from ssm_train.shape import VOCABULARY, model_shape, names_vocabulary

GIB = 2**30
ROOM = 0.92  # of a GPU's memory: the rest is CUDA's own, and what its allocator cannot join
MOST_TOKENS = 65_536  # of a row with `tokens_per_batch: auto`, but for a longer max_length
STEP = 1024  # such a row is a multiple of it
LOGIT_BYTES = 4 + 4 + 2  # logits, their gradient, and that in bf16, where some rows are at once


class Uncounted(InputError):
    """A right config, whose memory the plan does not know."""


@dataclass(frozen=True)
class Plan:
    """Bytes. `per_token` is what all layers and the head keep for a token of a row."""

    parameters: int
    trained: int
    weights: float
    training: float
    """Trained parameters again in the optimizer, and with autocast in the run's precision."""
    gradients: float
    gradients_stay: bool
    """In the forward pass too: of earlier micro-batches, to exchange with other processes, or
    because graphs add to them."""
    per_token: float
    recomputed: float
    """What the layer that is computed again keeps for a token."""
    working: float
    """What the backward pass of a layer has besides for a token."""
    logits: float
    tokens: int

    @property
    def fixed(self) -> float:
        """What is there through the whole step."""
        return self.weights + self.training + (self.gradients if self.gradients_stay else 0)

    def peak(self, tokens: int) -> float:
        """Where the forward pass turns round, or, with all weights trained, at the backward pass's
        end."""
        kept = self.of_row(tokens)
        return self.fixed + (kept if self.gradients_stay else max(kept, self.gradients))

    def of_row(self, tokens: int) -> float:
        """What its layers keep, and where the passes meet its logits or the last layer's work."""
        return tokens * (self.per_token + self.recomputed) + self.at_work(tokens)

    def at_work(self, tokens: int) -> float:
        return max(self.logits, tokens * self.working)

    def most_tokens(self, memory: float) -> int:
        """Of a row, so that the peak fits into `memory`."""
        room, each = memory * ROOM - self.fixed, self.per_token + self.recomputed
        return max(0, int(min((room - self.logits) / each, room / (each + self.working))))


def make_plan(cfg: RunConfig) -> Plan:
    """Counts a run. Raises InputError, Uncounted for rows of unknown length, and for families and
    methods that it does not know."""
    adapter, prepared = shape_run(cfg)
    if not hasattr(adapter, "kept"):
        raise Uncounted(f"plan does not know what layers of {adapter.name} keep")
    config: Any = prepared.model.config
    size = STORAGE[cfg.prec].itemsize
    embeddings: Any = prepared.model.get_input_embeddings()  # type: ignore[operator]
    stored = embeddings.weight.element_size()
    kept: Kept = adapter.kept(config, size, stored)
    per_token, recomputed, working = count_kept(kept, config, size, cfg.gradient_checkpointing)
    trained = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    tokens = tokens_of_row(cfg)
    copies = size if size < 4 and cfg.peft is None else 0  # what autocast keeps of trained weights
    return Plan(
        parameters=sum(p.numel() for p in prepared.model.parameters()),
        trained=trained,
        weights=sum(p.numel() * p.element_size() for p in prepared.model.parameters()),
        training=trained * (8 + copies),
        gradients=trained * 4,
        gradients_stay=gradients_stay(cfg),
        per_token=per_token + size * 3 * config.hidden_size,  # embedding, and around the last norm
        recomputed=recomputed,
        working=working,
        logits=LOGIT_BYTES * min(LOGITS_AT_ONCE, tokens * config.vocab_size),
        tokens=tokens,
    )


def shape_run(cfg: RunConfig) -> tuple[ModelAdapter, Prepared]:
    """A run's family, and its model with its PEFT on the meta device. Raises InputError, Uncounted
    for methods that look at weights."""
    peft = load_peft(cfg.peft, cfg.peft_overrides.given())
    if peft and hasattr(peft.settings, "init_lora_weights"):  # another start has the same size
        zeros = peft.settings.model_copy(update={"init_lora_weights": True})
        peft = replace(peft, settings=zeros)
    stored = torch.float32 if peft is None else STORAGE[cfg.prec]
    with torch.device("meta"):
        spec = ModelSpec(
            new_model=model_shape(cfg), adapter=cfg.adapter, dtype=stored, device="meta"
        )
        adapter, _ = registry.resolve(spec)
        prepared = adapter.prepare(spec)
        if peft is not None:
            try:
                peft.make().inject(prepared)
            except NotImplementedError:  # reads the weights
                raise Uncounted(f"plan cannot count {peft.peft_type} without weights") from None
    return adapter, prepared


def gradients_stay(cfg: RunConfig) -> bool:
    """Whether gradients have memory of their own in the forward pass, on a GPU."""
    processes = distributed.world_size()
    graphs_cannot = graphs.obstacle(
        torch.device("cuda"), cfg.packing, cfg.prec, bool(cfg.gradient_checkpointing)
    )
    records = cfg.cuda_graphs is not False and graphs_cannot is None
    return records or cfg.gradient_accumulation_steps > 1 or processes > 1


def count_kept(
    kept: Kept, config: Any, size: int, recompute: bool | str
) -> tuple[float, float, float]:
    """Bytes for a token in all layers, in the part that is computed again at a time, and besides in
    the backward pass of a layer, where that part has some of it already."""
    one = size * config.hidden_size  # what enters a part that is computed again
    mixer, mlp = kept.mixer + kept.made_mixer, kept.mlp + kept.made_mlp
    left, again, made = kept.layer + kept.mixer + kept.mlp, 0.0, 0.0
    if recompute is True:
        left, again = kept.entering, kept.layer + mixer + mlp + 2 * one
        made = kept.made_mixer + kept.made_mlp
    elif recompute == "mixer":
        left, again, made = left - kept.mixer + one, mixer, kept.made_mixer
    elif recompute == "mlp":
        left, again, made = left - kept.mlp + one, mlp, kept.made_mlp
    return config.num_hidden_layers * left, again, kept.working - made


def tokens_of_row(cfg: RunConfig) -> int:
    """Of a micro-batch, padding included."""
    if cfg.packing:
        return cfg.row_tokens
    if cfg.max_length is None:
        raise Uncounted("plan needs max_length, or packing: true: else rows have no known length")
    return cfg.batch_size * cfg.max_length


def describe(plan: Plan, memory: float, cfg: RunConfig) -> Iterator[str]:
    """The lines of `ssm-train plan`; `memory`: bytes of the GPU."""
    share = plan.trained / plan.parameters
    yield f"parameters   {plan.parameters:,}, of which {plan.trained:,} are trained ({share:.2%})"
    if not names_vocabulary(cfg):
        yield f"vocabulary   {VOCABULARY:,} ids assumed, as new_model says no vocab_size"
    yield f"weights      {gib(plan.weights)}"
    yield f"optimizer    {gib(plan.training)}, gradients {gib(plan.gradients)}"
    each = plan.per_token + plan.recomputed
    yield (
        f"activations  {gib(plan.tokens * each)}: {plan.tokens:,} tokens, "
        f"{each / 2**20:.2f} MiB each"
    )
    yield f"at work      {gib(plan.at_work(plan.tokens))}: logits, or gradients inside a layer"
    most = plan.most_tokens(memory)
    verdict = "" if plan.tokens <= most else ", which does not fit"
    yield f"peak         {gib(plan.peak(plan.tokens))} of {gib(memory)}{verdict}"
    if most < 1:
        yield "nothing fits: the weights and what is trained need more than that"
    elif cfg.packing:
        yield f"largest      tokens_per_batch {most:,}"
    else:
        yield f"largest      batch_size {most // (cfg.max_length or 1):,}"


# ---------------------------------------------------------------- tokens_per_batch: auto


def settle_tokens(cfg: RunConfig, device: torch.device) -> tuple[RunConfig, list[str]]:
    """All ranks, before the model is on `device`. The config with a number for
    `tokens_per_batch: auto`, and the line that says which. Raises InputError."""
    if cfg.tokens_per_batch != "auto":
        return cfg, []
    if device.type != "cuda":
        tokens = max(RunConfig.model_fields["tokens_per_batch"].default, cfg.max_length or 0)
        return with_tokens(cfg, tokens), [
            f"tokens_per_batch auto: {tokens:,} tokens, as the device is {device.type}"
        ]
    return fit_tokens(cfg, min(distributed.gather_objects([free_memory(device)])))


def fit_tokens(cfg: RunConfig, memory: float) -> tuple[RunConfig, list[str]]:
    """`settle_tokens` for a GPU of which `memory` bytes are free."""
    if cfg.tokens_per_batch != "auto":
        return cfg, []
    try:
        plan = make_plan(with_tokens(cfg, MOST_TOKENS))
    except Uncounted as error:
        raise Uncounted(
            f"tokens_per_batch auto: {error}; set tokens_per_batch to a number"
        ) from None
    most, least = plan.most_tokens(memory), cfg.max_length or STEP
    tokens = max(min(most, MOST_TOKENS) // STEP * STEP, least)
    free = f"{memory / GIB:.1f} GiB free"
    if tokens > most:
        what = f"max_length {least:,}" if cfg.max_length else f"a row of {least:,} tokens"
        raise InputError(
            f"tokens_per_batch auto: {what} does not fit into {free}, {most:,} tokens do; set "
            "gradient_checkpointing: true or a smaller max_length, train an adapter (peft), or "
            "free the GPU"
        )
    peak = f"{plan.peak(tokens) / GIB:.1f} GiB at peak"
    return with_tokens(cfg, tokens), [
        f"tokens_per_batch auto: {tokens:,} tokens fit into {free} (plan: {peak})"
    ]


def with_tokens(cfg: RunConfig, tokens: int) -> RunConfig:
    return cfg.model_copy(update={"tokens_per_batch": tokens})


def free_memory(device: torch.device) -> int:
    """Bytes of this GPU that nobody holds."""
    gc.collect()  # an earlier run of this process may have left something
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def memory_of_gpu() -> float:
    """Bytes of the GPU here; without one, of an H100."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return 79.2 * GIB
