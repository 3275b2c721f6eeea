"""What our own methods share inside Hugging Face PEFT: configurations made of their settings, and
how their layers come into a model and out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import Any, ClassVar

from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from torch import Tensor, nn

from ssm_train.adapters.base import Batch, Prepared, TokenLosses
from ssm_train.adapters.slices import join_slices
from ssm_train.errors import InputError
from ssm_train.peft.layers import OwnLayer
from ssm_train.peft.lora import quiet_peft
from ssm_train.settings import Settings

# ---------------------------------------------------------------- configurations


@dataclass
class OwnConfig(PeftConfig):
    """What the configurations of our own methods have besides the fields of their settings."""

    tuner: ClassVar[type[OwnTuner]]

    target_modules: Any = field(default=None)  # PEFT asks every configuration for it
    modules: list[str] | None = field(default=None)
    """Modules that the method chose; filled in at injection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.tuner.peft_name)

    @property
    def settings(self) -> Any:
        """The method's settings, checked."""
        schema = self.tuner.settings_class
        return schema.model_validate({name: getattr(self, name) for name in schema.model_fields})


def make_config_class(tuner: type[OwnTuner]) -> type[OwnConfig]:
    """The PEFT configuration whose fields are a method's settings."""

    def default_of(name: str) -> Any:
        info = tuner.settings_class.model_fields[name]

        def make() -> Any:
            value = info.get_default(call_default_factory=True)
            return value.model_dump() if isinstance(value, Settings) else value

        return field(default_factory=make)

    fields = [(name, Any, default_of(name)) for name in tuner.settings_class.model_fields]
    class_name = "".join(part.capitalize() for part in tuner.peft_name.split("_")) + "Config"
    made = make_dataclass(class_name, fields, bases=(OwnConfig,))
    made.tuner = tuner  # type: ignore[attr-defined]
    made.__doc__ = tuner.settings_class.__doc__
    made.__module__ = __name__
    return made


# ---------------------------------------------------------------- injection


class OwnTuner(BaseTuner):
    """Puts a method's layers where `choose` says, into a model of ours; a stock model becomes one
    first. One subclass a method."""

    peft_name: ClassVar[str]
    settings_class: ClassVar[type[Settings]]
    changes_function: ClassVar[str] = ""
    """Why the function at step 0 is not the base model's, where the method cannot begin there."""
    tuner_layer_cls = OwnLayer
    target_module_mapping: dict[str, list[str]] = {}

    def choose(self, settings: Any, model: nn.Module) -> dict[str, type[OwnLayer]]:
        """Module name -> the layer that goes around it. Raises InputError."""
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        from ssm_train.adapters.registry import adopt

        adopt(model)
        self.chosen = self.choose(peft_config.settings, model)
        peft_config.modules = sorted(self.chosen)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config.modules

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target
        if not isinstance(layer, OwnLayer):
            layer = self.chosen[current_key](target, parent, current_key)
            setattr(parent, target_name, layer)
        layer.add(adapter_name, peft_config.settings)
        layer.set_adapter(self.active_adapters)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        """At unloading: the module comes back as it is, or as `fold` left it."""
        setattr(parent, child_name, new_module)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        model: Any = super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )
        join_slices(model)
        return model

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Before any layer is merged: each says whether its values fit a weight."""
        for layer in own_layers(self.model).values():
            for adapter in adapter_names or layer.active_adapters:
                if adapter in layer.values and adapter not in layer.merged_adapters:
                    layer.check_merge(adapter, safe_merge)

    def _check_merge_allowed(self) -> None:
        """Nothing by model; see `_check_merge`."""


class OwnMethod:
    """A method of ours as a PeftMethod."""

    def __init__(self, config_class: type[OwnConfig], settings: Settings) -> None:
        self.config_class, self.settings = config_class, settings

    def inject(self, prepared: Prepared) -> None:
        """Wraps `prepared.model`; only the method's values are trainable, and they are fp32.

        Raises InputError where the method and the family do not go together.
        """
        model = prepared.model
        task = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
        config = self.config_class(task_type=task, **self.settings.model_dump())  # type: ignore[arg-type]
        with quiet_peft():
            prepared.model = get_peft_model(model, config)  # type: ignore[arg-type]

    def calibrate(
        self, prepared: Prepared, batches: Iterable[Batch], token_losses: TokenLosses
    ) -> None:
        """Nothing: the start depends on no data."""

    def stages(self) -> tuple[str, ...]:
        return ("train",)

    @property
    def changes_base(self) -> bool:
        return False

    def changed_base(self, model: nn.Module) -> dict[str, Tensor]:
        """Nothing: the base stays as it is."""
        return {}

    def restore_base(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to put back."""


def own_layers(model: nn.Module) -> dict[str, OwnLayer]:
    """Module name -> layer, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OwnLayer)}


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Module name -> module, as they were before any injection."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, OwnLayer):
            inside = (*inside, f"{name}.")
            module = module.base_layer
        found[name] = module
    return found


def find_sites(model: nn.Module, site: str, method: str) -> list[str]:
    """Names of the modules that are that site of a mixer. Raises InputError where there is none."""
    found = [name for name in bare_modules(model) if name.rpartition(".")[2] == site]
    if not found:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise InputError(
            f"peft_type {method}: {family} models have no {site.replace('_', ' ')} to train"
        )
    return found
