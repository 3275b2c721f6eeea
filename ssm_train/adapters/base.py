"""The seam between the loop and a model family: what the loop may know of a model, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from ssm_train.settings import Settings

KernelChoice = Literal["auto", "triton", "reference"]
Recompute = bool | Literal["mixer", "mlp"]

GLA_NAMES = r"\b(attn|mlp|[qkvog]_proj|gk_proj|GLA_\w+)\b"
"""What only PEFT configs of GLA name: its modules, its methods."""


@dataclass(frozen=True)
class Traits:
    """Facts about a model family, as data. Names are module or parameter name suffixes."""

    lora_targets: tuple[str, ...]
    """Default LoRA targets: every projection of the mixers and the MLPs."""
    raw_weight_reads: tuple[str, ...] = ()
    """Modules that stock kernels read past their forward; stock PEFT would train them in vain."""
    refused_targets: tuple[str, ...] = ()
    """Modules that stock PEFT refuses to load an adapter onto."""
    keep_fp32: tuple[str, ...] = ()
    """Parameters stored in fp32 in every preset (A_log, D, the biases before softplus)."""
    no_decay: tuple[str, ...] = ()
    """Parts of names of parameters that never get weight decay."""
    supports: frozenset[str] = frozenset()
    """Of "packing" and "grad_ckpt": a run that asks for another one is refused."""


class ModelSettings(Settings):
    """Which model, how it is stored and which kernels it uses."""

    model: str | None = None
    """Hub id, directory, or a run config (.yaml) whose result is the model, trained if need be."""
    new_model: dict[str, Any] | None = None
    """A model with random weights instead: a transformers configuration with its `model_type`."""
    adapter: str | None = None
    """Model family, when it should not be found out from the checkpoint."""
    revision: str | None = None
    """Revision of a hub model."""
    tokenizer: str | dict[str, Any] | None = None
    """Hub id or directory; or {type: word|bpe, vocab_size: N}, built from the training data.
    None: the checkpoint's own, else EleutherAI/gpt-neox-20b for Mamba."""
    prec: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Arithmetic of the model and storage of its frozen weights; trained weights are fp32."""
    tf32: bool = False
    """On a GPU, PyTorch's fp32 products may be in TF32 (10 bits of 23), as fla's kernels always
    are."""
    kernels: KernelChoice = "auto"
    """Implementation of the mixers' operations."""
    backend: str = "cuda"
    """Kept for old configs: another name than "cuda" means `kernels: reference`."""
    gradient_checkpointing: Recompute = False
    """Recompute the layers in the backward pass to save memory; mixer or mlp: only these parts."""
    logits_to_keep: int | None = Field(default=None, ge=0)
    """Kept for old configs: logits are only ever computed at supervised positions."""


@dataclass(frozen=True)
class ModelSpec:
    """What to load: a checkpoint (hub id or directory), or a new model from a configuration."""

    model: str | None = None
    new_model: Mapping[str, Any] | None = None
    """`{"model_type": ..., ...}`: a new model with random weights, when `model` is None."""
    tokenizer: str | None = None
    """Hub id or directory; None: the checkpoint's own."""
    adapter: str | None = None
    """Explicit family name; None: routed (see registry.resolve)."""
    revision: str | None = None
    dtype: torch.dtype = torch.float32
    """How frozen weights are stored; Traits.keep_fp32 stays fp32."""
    kernels: KernelChoice = "auto"
    gradient_checkpointing: Recompute = False
    device: str = "cpu"
    """Where the model will run."""
    place: str | None = None
    """Where its weights are made and left, if not on `device`: "meta" for a process that gets its
    part of them from another (ZeRO-3, FSDP2), which reads no file of weights."""

    def init_context(self) -> AbstractContextManager[Any]:
        """Around what makes a model: weights come into being in their place."""
        return nullcontext() if self.place is None else torch.device(self.place)


@dataclass
class Prepared:
    """All that the loop ever sees of a model."""

    model: nn.Module
    tokenizer: Any
    traits: Traits
    kernels: dict[str, str] = field(default_factory=dict)
    """op -> implementation in use, for the log."""
    notes: list[str] = field(default_factory=list)
    """Lines for the log."""
    place: str | None = None
    """Where its weights wait to be dealt to all processes (`ModelSpec.place`): only rank 0's count.
    None: all processes have them."""


@dataclass
class Batch:
    """One micro-batch of one rank: rows padded to one length, or documents packed into one row.

    Supervision is a list of positions, made on the host, so that the model computes logits only
    there and the count is known without a device sync. Targets are already shifted: `targets[s]`
    is the token that follows flat position `target_positions[s]`, inside one document.
    """

    input_ids: Tensor  # [B, T] int64
    target_positions: Tensor  # [S] int64, indices into the flattened [B * T]
    targets: Tensor  # [S] int64
    sequence_ids: Tensor  # [B, T] int64: which document of this batch, -1 on padding
    position_ids: Tensor  # [B, T] int64: position inside the document, 0 on padding
    attention_mask: Tensor | None = None  # [B, T] bool, True on real tokens; None when packed
    cu_seqlens: Tensor | None = None  # [N + 1] int32 row offsets, packed rows only (B = 1)
    example_ids: tuple[int, ...] = ()  # index in the data set of each document
    num_tokens: int = 0  # real tokens, padding excluded

    @property
    def num_targets(self) -> int:
        return self.targets.numel()

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


@dataclass
class LossSum:
    """Cross entropy summed over the supervised tokens of a batch (nats), and their number."""

    loss: Tensor  # [] fp32
    num_targets: int


@dataclass(frozen=True)
class Kept:
    """Bytes that a layer keeps for each token of a packed row between the passes, on a GPU. An
    adapter that `ssm-train plan` knows has `kept(config, size, stored)`: its transformers
    configuration, and the bytes of a number in the run's precision and of one as weights are
    stored, in which embeddings enter the layers."""

    entering: float
    """What it reads, which is all that stays of a layer that is computed again."""
    layer: float
    """Outside of its parts."""
    mixer: float
    mlp: float = 0.0
    made_mixer: float = 0.0
    """What of the mixer is made again, which it keeps where all of it is computed again."""
    made_mlp: float = 0.0
    working: float = 0.0
    """What its backward pass has besides, where that is most."""


class ModelAdapter(Protocol):
    """One model family. Knows nothing of training."""

    name: str
    traits: Traits

    def choose_kernels(self, kernels: KernelChoice, device: str) -> dict[str, str]:
        """op -> implementation on this device. Raises InputError when the choice cannot run."""
        ...

    def prepare(self, spec: ModelSpec) -> Prepared:
        """Weights, tokenizer, dtype islands, kernels; no PEFT, no data."""
        ...

    def token_losses(self, model: nn.Module, batch: Batch) -> LossSum:
        """Loss over `batch.targets`. `model` may be wrapped (PEFT, DDP, DeepSpeed)."""
        ...

    def token_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits at `batch.target_positions`, [S, V] fp32."""
        ...


TokenLosses = Callable[[nn.Module, Batch], LossSum]


class PeftMethod(Protocol):
    """One way to choose or add trainable parameters."""

    def inject(self, prepared: Prepared) -> None:
        """Adds parameters to `prepared.model` (may replace it) and sets requires_grad."""
        ...

    def calibrate(
        self, prepared: Prepared, batches: Iterable[Batch], token_losses: TokenLosses
    ) -> None:
        """For methods that look at data before training; others do nothing. All ranks.

        `batches`: the training examples, one a batch, without an end and on every rank the same.
        A resumed run calls `restore_base` instead.
        """
        ...

    @property
    def changes_base(self) -> bool:
        """Whether `changed_base` may give anything; the same on all ranks."""
        ...

    def changed_base(self, model: nn.Module) -> dict[str, Tensor]:
        """What `inject` or `calibrate` changed or must remember of the base, for checkpoints."""
        ...

    def restore_base(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `changed_base` returned."""
        ...
