"""LoRA (arXiv 2106.09685) and its variants through Hugging Face PEFT, on every projection of every
family: their settings, how they start, what they keep of the base.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from ssm_train.adapters.base import Batch, Prepared, TokenLosses
from ssm_train.peft.lora_ga import check_ranks, start_along_gradients
from ssm_train.peft.targets import resolve_targets
from ssm_train.settings import Settings

INITS = "true, gaussian, orthogonal, pissa, pissa_niter_<number>, olora, lora_ga"
CHANGES_BASE = ("pissa", "olora", "lora_ga")
"""How the names of inits begin that move a part of the base weight into the factors."""
LORA_GA = (
    *("loraga_batch_size", "loraga_steps", "loraga_layerwise", "loraga_stable_c"),
    "direction",
)
"""Settings that only init_lora_weights lora_ga reads."""


class LoraSettings(Settings):
    """The keys of a LoRA JSON, under the names of PEFT's LoraConfig where it has them."""

    r: int = Field(default=8, ge=1)
    """Rank."""
    lora_alpha: float = Field(default=8, gt=0)
    """The update is scaled by alpha / r, with rsLoRA by alpha / sqrt(r)."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of A."""
    target_modules: list[str] | str | None = None
    """Module names or their ends; a regular expression; "all-linear"; None: the family's own."""
    exclude_modules: list[str] | str | None = None
    """Modules left out, by the same rules."""
    modules_to_save: list[str] | None = None
    """Modules trained in full beside the factors, such as conv1d; exported with them."""
    layers_to_transform: list[int] | int | None = None
    """Layers to adapt; None: all."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of layers, when it is not found by itself."""
    init_lora_weights: bool | str = True
    """Initialisation: true, gaussian, orthogonal, pissa, pissa_niter_<number>, olora, lora_ga."""
    use_rslora: bool = False
    """Rank-stabilized scaling (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353)."""
    rank_pattern: dict[str, int] = {}
    """Rank by module name or regular expression, where it is not `r`."""
    alpha_pattern: dict[str, float] = {}
    """Alpha by module name or regular expression, where it is not `lora_alpha`."""
    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    """LoRA+ (arXiv 2402.12354): learning rate of B over that of A; None: 1."""
    loraga_batch_size: int = Field(default=1, ge=1)
    """LoRA-GA: training examples in a gradient step."""
    loraga_steps: int = Field(default=1, ge=1)
    """LoRA-GA: gradient steps whose mean is decomposed."""
    loraga_layerwise: bool = False
    """LoRA-GA: gradients of one layer at a time: less memory, a pass for each layer."""
    loraga_stable_c: float = Field(default=1.0, gt=0)
    """LoRA-GA: the start has scale * norm(B A) = sqrt(loraga_stable_c)."""
    direction: Literal["ArB2r", "legacy"] = "ArB2r"
    """LoRA-GA: singular vectors in A and B; ArB2r is the paper's."""

    @field_validator("target_modules", "modules_to_save", "layers_to_transform")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value in ([], ""):
            raise ValueError("it should name at least one, or be left out")
        return value

    @field_validator("init_lora_weights")
    @classmethod
    def _known_init(cls, value: bool | str) -> bool | str:
        if isinstance(value, str):
            value = {"true": True, "default": True}.get(value.lower(), value.lower())
        known = value is True or value in ("gaussian", "orthogonal", "pissa", "olora", "lora_ga")
        if not known and not re.fullmatch(r"pissa_niter_\d+", str(value)):
            raise ValueError(f"it should be one of {INITS}")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _usable_patterns(cls, patterns: dict[str, float]) -> dict[str, float]:
        for pattern, value in patterns.items():
            _check_expression(pattern)
            if value <= 0:
                raise ValueError(f"{pattern!r} should be more than 0")
        return patterns

    @field_validator(*LORA_GA)
    @classmethod
    def _only_for_lora_ga(cls, value: Any, info: ValidationInfo) -> Any:
        init = info.data.get("init_lora_weights", "lora_ga")  # missing: reported already
        if init != "lora_ga":
            raise ValueError(
                f"it has no effect with init_lora_weights {init}; set that to lora_ga, or remove it"
            )
        return value

    @model_validator(mode="after")
    def _no_contradiction(self) -> LoraSettings:
        if isinstance(self.target_modules, str):
            _check_expression(self.target_modules)
            if self.layers_to_transform is not None:
                raise ValueError(
                    "layers_to_transform needs target_modules to be a list, "
                    f"not {self.target_modules!r}"
                )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform")
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in self._ranks()):
            raise ValueError("init_lora_weights orthogonal needs even ranks")
        return self

    def _ranks(self) -> list[int]:
        return [self.r, *self.rank_pattern.values()]

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation moves a part of the base weight into the factors."""
        return str(self.init_lora_weights).startswith(CHANGES_BASE)

    @property
    def starts_from_data(self) -> bool:
        """Whether the factors are found by `calibrate`, and not at injection."""
        return self.init_lora_weights == "lora_ga"


class LoraMethod:
    """LoRA and its variants as a PeftMethod."""

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings
        self.initial: dict[str, Tensor] = {}
        """A and B as they started, once that changed the base; else empty."""

    def inject(self, prepared: Prepared) -> None:
        """Wraps `prepared.model`; only the new factors are trainable, and they are fp32.

        The function is unchanged at step 0. Raises InputError for targets that match nothing,
        cannot be adapted, or are smaller than the rank.
        """
        from peft import get_peft_model

        from ssm_train.peft.registration import SsmLoraConfig

        model, settings = prepared.model, self.settings
        targets = resolve_targets(model, prepared.traits, settings)
        if settings.starts_from_data:
            check_ranks(model, targets, settings)
        with warnings.catch_warnings():
            # PEFT's own conversion cannot undo PiSSA with rsLoRA and patterns; our export can.
            warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA with")
            config = SsmLoraConfig(
                task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
                target_modules=targets,
                **settings.model_dump(exclude={"target_modules", "loraplus_lr_ratio", *LORA_GA}),
            )
        with quiet_peft():
            prepared.model = get_peft_model(model, config)
        for parameter in prepared.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if settings.changes_base and not settings.starts_from_data:
            self._keep_start(prepared)

    def calibrate(
        self, prepared: Prepared, batches: Iterable[Batch], token_losses: TokenLosses
    ) -> None:
        """LoRA-GA: factors from the gradients of a few examples, once; else nothing. All ranks.

        Raises InputError for a gradient that is not finite.
        """
        if self.settings.starts_from_data and not self.initial:
            model = prepared.model
            start_along_gradients(lora_layers(model), model, batches, token_losses, self.settings)
            self._keep_start(prepared)

    def _keep_start(self, prepared: Prepared) -> None:
        if prepared.place is None:
            _share_start(prepared.model)
        if prepared.place != "meta":
            self.initial = snapshot_initial(prepared.model)

    def lr_scale(self, name: str) -> float:
        """LoRA+: what the learning rate is multiplied by for the parameter of this name."""
        is_B = {"lora_B", "lora_embedding_B"} & set(name.split("."))
        return self.settings.loraplus_lr_ratio or 1.0 if is_B else 1.0

    def stages(self) -> tuple[str, ...]:
        return ("train",)

    @property
    def changes_base(self) -> bool:
        return self.settings.changes_base

    def changed_base(self, model: nn.Module) -> dict[str, Tensor]:
        """The base weights that gave a part away, and the factors that took it, as they began."""
        if not self.initial:
            return {}
        return {
            **{f"initial.{name}": tensor for name, tensor in self.initial.items()},
            **{
                f"weight.{name}": layer.get_base_layer().weight.detach()
                for name, layer in lora_layers(model).items()
            },
        }

    def restore_base(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """An SVD need not come out the same on another machine: a resumed run takes the old one."""
        self.initial = {
            name.removeprefix("initial."): tensor
            for name, tensor in tensors.items()
            if name.startswith("initial.")
        }
        with torch.no_grad():
            for name, layer in lora_layers(model).items():
                layer.get_base_layer().weight.copy_(tensors[f"weight.{name}"])


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without two warnings of PEFT's: that it asks transformers for a property under its old name,
    and that a tied head may be exported or merged wrongly, which ours is not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        yield


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Module name -> PEFT's LoRA layer, in the model's order."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def snapshot_initial(model: nn.Module) -> dict[str, Tensor]:
    """Copies of A and B under the names they have in an exported adapter file, on the CPU.

    Taken before training; `export_adapter` needs them when the base was changed.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in state.items()
        if "lora_A" in name or "lora_B" in name
    }


def _share_start(model: nn.Module) -> None:
    """Rank 0's factors and changed base weights on every rank: an SVD may differ between ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for parameter in layer.parameters():
                dist.broadcast(parameter.data, src=0)


def _check_expression(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
