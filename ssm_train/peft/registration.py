"""Our types inside Hugging Face PEFT: SSM_LORA, which is LoRA for models whose forwards reach every
adapted matrix, and our own methods. The only file that extends PEFT's own tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import Linear
from peft.utils import PeftType, register_peft_method
from torch import nn

from ssm_train.adapters.slices import join_slices
from ssm_train.errors import InputError
from ssm_train.peft.additional_scan import AdditionalScanModel
from ssm_train.peft.affix_tuning import AffixTuningModel
from ssm_train.peft.bitfit import BitFitModel
from ssm_train.peft.fused_lora import FusedLoraLinear
from ssm_train.peft.gla_sd_lora import GlaSdLoraModel
from ssm_train.peft.initial_state import InitialStateModel
from ssm_train.peft.layer_freeze import LayerFreezeModel
from ssm_train.peft.param_transform import ParamTransformModel
from ssm_train.peft.sd_lora import SdLoraModel
from ssm_train.peft.state_offset import StateOffsetModel
from ssm_train.peft.targets import cut_targets
from ssm_train.peft.tuner import OwnConfig, make_config_class

SSM_LORA = "SSM_LORA"


@dataclass
class SsmLoraConfig(LoraConfig):
    """LoraConfig under a type that a PEFT without this package does not know, and so refuses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(SSM_LORA)


class SsmLoraModel(LoraModel):
    """LoRA layers in a model of ours; a stock transformers or fla model becomes one first."""

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # Lazy: adapters import transformers models and fla, which a toy module does not need.
        from ssm_train.adapters.registry import adopt

        super()._prepare_model(peft_config, model)
        if hasattr(model, "config"):
            adopt(model)
            if not any(type(m).__module__.startswith("ssm_train.") for m in model.modules()):
                cls = type(model)
                raise InputError(
                    f"{cls.__module__}.{cls.__name__} has the model_type of a supported family but "
                    "is another implementation; load the model through transformers' own class "
                    "(importing fla makes Auto classes choose fla's)"
                )
        cut_targets(model, peft_config)

    def _create_and_replace(  # type: ignore[no-untyped-def, override]
        self, lora_config, adapter_name, target: nn.Linear, *where, **options
    ) -> None:
        """PEFT casts new factors to the base's dtype; rounded to bf16, an SVD is not the weight."""
        weight = target.weight
        stored = weight.dtype
        if stored in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()
        super()._create_and_replace(lora_config, adapter_name, target, *where, **options)
        weight.data = weight.data.to(stored)

    @staticmethod
    def _create_new_module(*where: Any, **options: Any) -> nn.Module:
        module: nn.Module = LoraModel._create_new_module(*where, **options)
        if type(module) is Linear:
            module.__class__ = FusedLoraLinear
        return module

    def _unload_and_optionally_merge(self, *args: Any, **options: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **options)
        join_slices(model)
        return model

    def _check_target_module_compatiblity(
        self, peft_config: PeftConfig, model: nn.Module, target_name: str
    ) -> None:
        """No module is refused by model type: after `adopt` every projection is really called.

        PEFT refuses out_proj of Mamba models because fused kernels read its weight directly.
        """


CONFIGS: dict[str, type[OwnConfig]] = {
    tuner.peft_name: make_config_class(tuner)
    for tuner in (
        *(LayerFreezeModel, BitFitModel, InitialStateModel, StateOffsetModel),
        *(ParamTransformModel, AdditionalScanModel, AffixTuningModel),
        *(SdLoraModel, GlaSdLoraModel),
    )
}
"""peft_type -> PEFT configuration of our own methods."""


def register() -> None:
    """Adds SSM_LORA and our own methods to PEFT's enumeration and tables; a second call changes
    nothing."""
    _add(SSM_LORA, SsmLoraConfig, SsmLoraModel)
    for name, config_class in CONFIGS.items():
        _add(name, config_class, config_class.tuner)


def _add(name: str, config_class: Any, tuner: Any) -> None:
    if name not in PeftType._value2member_map_:
        _extend_enumeration(name)
    if PeftType(name) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=name.lower(), config_cls=config_class, model_cls=tuner, prefix=tuner.prefix
        )


def _extend_enumeration(name: str) -> None:
    # Python closes an enumeration with members; these are the places where a member is looked up.
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
