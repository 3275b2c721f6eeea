"""SD_LORA: sparse dimension tuning with LoRA (Galim et al. 2025, arXiv 2410.09016). A warm-up finds
the channels and states of A that move most; then those alone train, with LoRA on the projections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ssm_train.adapters.base import Prepared
from ssm_train.adapters.modules import Site, matches
from ssm_train.adapters.slices import cut_slices, slice_names
from ssm_train.errors import InputError, near
from ssm_train.peft.dimensions import Choice, Selection, choose
from ssm_train.peft.layer_freeze import SITE_OF, is_named, names_parameter
from ssm_train.peft.layers import OwnLayer
from ssm_train.peft.sd_lora_settings import SdLoraSettings
from ssm_train.peft.sparse import (
    ChosenLayer,
    DecayLayer,
    FinetunedSite,
    ProjectionLayer,
)
from ssm_train.peft.tuner import OwnConfig, OwnMethod, OwnTuner, bare_modules, family_of, own_layers


class SdLoraModel(OwnTuner):
    peft_name = "SD_LORA"
    prefix = DecayLayer.prefix
    settings_class = SdLoraSettings
    changes_function = "zeroed channels lose their memory (num_zero)"

    def choose(self, settings: SdLoraSettings, model: nn.Module) -> dict[str, type[OwnLayer]]:
        chosen = self.choosing_layers(settings, model)
        slices = slice_names(model)
        sparse = settings.chosen_names
        if settings.target_modules is None and settings.chooser == "A_log":
            sparse = [name for name in sparse if name in slices]  # Mamba-2 has none of them
        for name in sparse:
            for whole in settings.lora_names:
                if name in slices and name.startswith(f"{whole}_"):
                    raise InputError(
                        f"peft_type {self.peft_name}: {name} is a slice of {whole}, which has LoRA "
                        "as a whole; name its other slices in lora_targets"
                    )
        known = dict.fromkeys([*(p.rpartition(".")[2] for p in bare_modules(model)), *slices])
        for name in [*sparse, *settings.lora_names]:
            if name not in slices and not any(matches(p, [name]) for p in bare_modules(model)):
                raise InputError(
                    f"peft_type {self.peft_name}: {name!r} matches no module{near(name, known)}"
                )
        named = [*(name for name in sparse if settings.sparse_names), *settings.lora_names]
        entries = settings.finetune_parameters or []
        cut_slices(model, lambda p: matches(p, named) or names_parameter(p, entries))
        modules = bare_modules(model)
        for place, module in modules.items():
            if matches(place, named):
                if not isinstance(module, nn.Linear):
                    raise InputError(f"peft_type {self.peft_name}: {place} is no linear layer")
                chosen[place] = ProjectionLayer
        return chosen | find_finetuned(entries, modules, chosen)

    def choosing_layers(
        self, settings: SdLoraSettings, model: nn.Module
    ) -> dict[str, type[OwnLayer]]:
        """The places whose movement chooses."""
        modules = bare_modules(model)
        found = [place for place in modules if matches(place, ["log_decay"])]
        heads = [p for p in found if model.get_submodule(p.rpartition(".")[0]).A_log.ndim == 1]  # type: ignore[operator]
        if heads and settings.target_modules and settings.chosen_names:
            raise InputError(
                f"peft_type {self.peft_name}: Mamba-2 chooses heads, which are no rows or columns "
                f"of {settings.chosen_names[0]}; remove it, or give it LoRA (proj_lora_r)"
            )
        if not found:
            family = family_of(model)
            raise InputError(
                f"peft_type {self.peft_name}: {family} models have no A_log to choose from"
                + ("; use GLA_SD_LORA" if family == "gla" else "")
            )
        return dict.fromkeys(found, DecayLayer)


def find_finetuned(
    entries: list[str], modules: Mapping[str, nn.Module], taken: Mapping[str, type[OwnLayer]]
) -> dict[str, type[OwnLayer]]:
    """Module or site -> layer, for the parameters that train in full. Raises InputError."""
    found: dict[str, type[OwnLayer]] = {}
    parameters = [
        (place, name, parameter)
        for place, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    owners = Counter(id(parameter) for *_, parameter in parameters)
    for entry in entries:
        places: dict[str, type[OwnLayer]] = {}
        for place, name, parameter in parameters:
            if not is_named(f"{place}.{name}", [entry]):
                continue
            if owners[id(parameter)] > 1:
                raise InputError(
                    f"finetune_parameters: {place}.{name} is shared by two modules "
                    "(tie_word_embeddings), and only one would be trained; leave it out"
                )
            site = f"{place}.{SITE_OF.get(name)}"
            at_site = isinstance(modules.get(site), Site)
            places |= {site: FinetunedSite} if at_site else {place: ProjectionLayer}
        if not places:
            raise InputError(f"finetune_parameters: {entry!r} is in no parameter name")
        if clash := [place for place in places if taken.get(place) is DecayLayer]:
            raise InputError(f"finetune_parameters: {entry!r} trains {clash[0]}, which is a target")
        found |= places
    return found


class SdLoraMethod(OwnMethod):
    """SD_LORA as a PeftMethod of two stages."""

    settings: SdLoraSettings

    def __init__(self, config_class: type[OwnConfig], settings: SdLoraSettings) -> None:
        if settings.stage != "train":
            raise InputError("stage: a run goes through both stages by itself; remove it")
        super().__init__(config_class, settings.model_copy(update={"stage": "warmup"}))

    @property
    def stage(self) -> str:
        """The stage that `inject` begins, or has begun."""
        return self.settings.stage

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the first stage."""
        return self.settings.num_warmup_it + 1

    def record(self) -> dict[str, Any]:
        """The settings that are no defaults, as a JSON config has them."""
        return self.settings.model_dump(exclude_defaults=True, exclude={"stage"})

    def select(self, model: nn.Module) -> Selection:
        """The dimensions that the warm-up of `model` chose."""
        return select_dimensions(model, self.settings)

    def begin_training(self, prepared: Prepared, selection: Selection | None = None) -> None:
        """The second stage, from the pretrained weights: what the warm-up trained is dropped.

        Without a selection `restore_base` gives it.
        """
        if hasattr(prepared.model, "peft_config"):
            prepared.model = prepared.model.unload()  # type: ignore[operator]
        self.settings = self.settings.model_copy(update={"stage": "train"})
        self.inject(prepared)
        if selection is not None:
            give_selection(prepared.model, selection)

    @property
    def changes_base(self) -> bool:
        return True

    def changed_base(self, model: nn.Module) -> dict[str, Tensor]:
        """The choice, for checkpoints of the second stage: `<module>.<index>` -> int64."""
        return {
            f"{name}.{key}": index
            for name, layer in chosen_layers(model).items()
            for key, index in layer.choices["default"].items()
        }

    def restore_base(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        for name, layer in chosen_layers(model).items():
            for key, index in layer.choices["default"].items():
                index.copy_(tensors[f"{name}.{key}"])


def chosen_layers(model: nn.Module, adapter: str = "default") -> dict[str, ChosenLayer]:
    """Module name -> layer that knows this adapter's choice, in the model's order."""
    return {
        name: layer
        for name, layer in own_layers(model).items()
        if isinstance(layer, ChosenLayer) and adapter in layer.choices
    }


def select_dimensions(
    model: nn.Module, settings: SdLoraSettings, adapter: str = "default"
) -> Selection:
    """The choice after this adapter's warm-up, by mixer. Raises InputError where nothing moved."""
    layers: dict[str, Choice] = {}
    for layer in chosen_layers(model, adapter).values():
        if "dense" not in layer.values[adapter]:
            continue
        moved = layer.moved(adapter).cpu()
        if not bool(moved.sum() > 0):
            raise InputError(f"{layer.place} did not move in the warm-up; raise num_warmup_it")
        states = settings.divide_states(moved.shape[1]) if layer.has_states else None
        mixer = layer.place.partition(".gk_proj")[0].removesuffix(".log_decay")
        layers[mixer] = choose(moved, settings.divide_channels(len(moved)), states)
    if not layers:
        raise InputError("this model was not warmed up; begin with stage: warmup")
    return Selection(layers)


def give_selection(model: nn.Module, selection: Selection, adapter: str = "default") -> None:
    """Writes the choice into the layers of an adapter of stage train, which has as many indices."""
    for layer in chosen_layers(model, adapter).values():
        for mixer, choice in selection.layers.items():
            if layer.place.startswith(f"{mixer}."):
                for key, index in layer.choices[adapter].items():
                    chosen = getattr(choice, key)
                    assert chosen.shape == index.shape, (layer.place, key, chosen.shape)
                    index.copy_(chosen)
