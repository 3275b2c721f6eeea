"""Which modules a LoRA config names, and whether LoRA can sit there. Each name must match:
a name that is silently ignored is an experiment that was not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ssm_train.adapters.base import Traits
from ssm_train.adapters.slices import SlicedLinear, cut_slices, find_slices, slice_names
from ssm_train.errors import InputError, near

if TYPE_CHECKING:
    from peft import LoraConfig

    from ssm_train.peft.lora import LoraSettings

ALL_LINEAR = "all-linear"


def resolve_targets(model: nn.Module, traits: Traits, settings: LoraSettings) -> list[str] | str:
    """The target_modules for PEFT: names, or the regular expression as it was given. Layers of
    which a slice is named are cut.

    Raises InputError for a name, a layer or a pattern that matches nothing, a module that LoRA
    cannot adapt, and a rank larger than the matrix.
    """
    targets = settings.target_modules
    if targets is None:
        targets = list(traits.lora_targets)
    elif targets == ALL_LINEAR:
        targets = sorted(_linear_layers(model))
    _check_modules_to_save(model, targets, settings.modules_to_save or [])
    _cut_slices(model, targets, settings)
    matches = match_targets(model, targets, settings)
    matched = {name: target for target, names in matches.items() for name in names}
    modules = dict(model.named_modules())
    for name, target in matched.items():
        _check_kind(name, modules[name], target, modules)
    _check_patterns("rank_pattern", settings.rank_pattern, matched)
    _check_patterns("alpha_pattern", settings.alpha_pattern, matched)
    for name in matched:
        _check_rank(name, modules[name], rank_of(name, settings))
    if settings.changes_base:
        _check_untied(matched, modules, str(settings.init_lora_weights))
    return targets


def match_targets(
    model: nn.Module, targets: list[str] | str, settings: LoraSettings
) -> dict[str, list[str]]:
    """Target -> names of the modules it matches, by PEFT's own rules. Raises InputError."""
    names = [name for name, _ in model.named_modules() if name]

    def matches(target: str, layers: list[int] | int | None) -> list[str]:
        one = target if isinstance(targets, str) else [target]
        return list(filter(_matcher(one, settings, layers), names))

    wanted = [targets] if isinstance(targets, str) else list(dict.fromkeys(targets))
    layers = settings.layers_to_transform
    found = {target: matches(target, layers) for target in wanted}
    for target, hits in found.items():
        if hits:
            continue
        if layers is not None and matches(target, None):
            raise InputError(
                f"target_modules: {target!r} is in no layer of layers_to_transform {layers}"
            )
        if settings.exclude_modules and any(_ends_with(name, target) for name in names):
            raise InputError(
                f"target_modules: all of {target!r} is in exclude_modules "
                f"{settings.exclude_modules}; remove it from one of them"
            )
        raise InputError(f"target_modules: {target!r} matches no module{_suggest(target, model)}")
    for layer in layers if isinstance(layers, list) else []:
        if not any(matches(target, [layer]) for target in wanted):
            raise InputError(
                f"layers_to_transform: no target is in layer {layer}; the model's last layer is "
                f"{_last_layer(names)}"
            )
    return found


def _matcher(
    targets: list[str] | str, settings: LoraSettings, layers: list[int] | int | None
) -> Callable[[str], bool]:
    """Whether a module of a name is one of the targets in these layers, by PEFT's own rules."""
    from peft.tuners.tuners_utils import check_target_module_exists

    config = _lora_config(targets, settings, layers)
    return lambda name: bool(check_target_module_exists(config, name))


def _lora_config(
    targets: list[str] | str, settings: LoraSettings, layers: list[int] | int | None
) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        target_modules=targets,
        exclude_modules=settings.exclude_modules,
        layers_to_transform=layers,
        layers_pattern=None if layers is None else settings.layers_pattern,
    )


def cut_targets(model: nn.Module, config: Any) -> None:
    """Cuts the layers of which a PEFT configuration names slices and which it does not exclude."""
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    def wanted(name: str) -> bool:
        whole = check_target_module_exists(config, name.rpartition(".")[0])
        excluded = isinstance(whole, _ExcludedModule)
        return not excluded and bool(check_target_module_exists(config, name))

    cut_slices(model, wanted)


def rank_of(name: str, settings: LoraSettings) -> int:
    """Rank at one module: the first pattern of rank_pattern that matches, else r."""
    return next(
        (rank for pattern, rank in settings.rank_pattern.items() if _ends_with(name, pattern)),
        settings.r,
    )


def find_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head else None


def _linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers but the output head."""
    head = find_head(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]


def _check_kind(
    name: str, module: nn.Module, target: str, modules: Mapping[str, nn.Module]
) -> None:
    if isinstance(module, nn.Linear):
        return
    kind = type(module).__name__
    if isinstance(module, nn.Conv1d):
        raise InputError(
            f"target_modules: {name} is a convolution of {module.groups} groups of "
            f"{module.in_channels // module.groups} channel; LoRA's low-rank product mixes all "
            f"channels and does not fit there. Remove {target}, or train it in full by "
            f'"modules_to_save": ["{name.rpartition(".")[2]}"]'
        )
    inside = [
        child.removeprefix(f"{name}.")
        for child, m in modules.items()
        if child.startswith(f"{name}.") and isinstance(m, nn.Linear)
    ]
    way_out = ", ".join(f"{target}.{child}" for child in inside[:8])
    raise InputError(
        f"target_modules: {name} is a {kind}, and LoRA adapts linear layers"
        + (f"; name them: {way_out}" if inside else "; remove it")
    )


def _cut_slices(model: nn.Module, targets: list[str] | str, settings: LoraSettings) -> None:
    """Makes the slices that are targets modules. Raises InputError where the layer is one too."""
    wanted = _matcher(targets, settings, settings.layers_to_transform)
    for place, linear, rows in find_slices(model):
        if isinstance(targets, list) and wanted(f"{place}.{linear}"):
            for name in rows:
                if name in targets:
                    raise InputError(
                        f"target_modules: {name!r} is a slice of {linear}, which is a target as a "
                        "whole; name one of the two"
                    )
    cut_targets(model, _lora_config(targets, settings, settings.layers_to_transform))
    for saved in settings.modules_to_save or []:
        for name, module in model.named_modules():
            if isinstance(module, SlicedLinear) and re.match(rf"(.*\.)?{saved}($|\..*)", name):
                raise InputError(
                    f"modules_to_save: {name} cannot train in full while LoRA sits on a slice of "
                    "it; remove it from one of the two"
                )


def _check_modules_to_save(
    model: nn.Module, targets: list[str] | str, modules_to_save: Iterable[str]
) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for wanted in modules_to_save:
        if wanted in targets:
            raise InputError(
                f"modules_to_save: {wanted!r} is in target_modules too; train it in full or by "
                "LoRA, not both"
            )
        if not any(name.endswith(wanted) for name in names):
            hint = near(wanted, dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise InputError(f"modules_to_save: {wanted!r} matches no module{hint}")


def _check_patterns(key: str, patterns: Mapping[str, float], matched: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(_ends_with(name, pattern) for name in matched):
            hint = near(pattern, _endings(matched))
            raise InputError(f"{key}: {pattern!r} matches no targeted module{hint}")


def _check_rank(name: str, module: nn.Module, rank: int) -> None:
    assert isinstance(module, nn.Linear)
    largest = min(module.in_features, module.out_features)
    if rank > largest:
        last = name.rpartition(".")[2]
        raise InputError(
            f"r is {rank}, but {name} is {module.out_features} x {module.in_features}, of rank "
            f'{largest} at most; lower r, or add rank_pattern {{"{last}": {largest}}}'
        )


def _check_untied(matched: Iterable[str], modules: Mapping[str, nn.Module], init: str) -> None:
    for name in matched:
        weight = modules[name].weight
        for other, module in modules.items():
            if other != name and getattr(module, "weight", None) is weight:
                raise InputError(
                    f"init_lora_weights {init} changes the weight of {name}, which {other} "
                    f"shares; leave {name} out, or use init_lora_weights true"
                )


def _ends_with(name: str, pattern: str) -> bool:
    """PEFT's rule for patterns: a regular expression for whole last parts of a module name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _suggest(target: str, model: nn.Module) -> str:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    endings = [*_endings(linear), *slice_names(model)]
    return near(target, endings) or f"; linear layers here: {', '.join(endings[:12])}"


def _endings(names: Iterable[str]) -> list[str]:
    """The last parts of module names that tell them apart, such as in_proj and gk_proj.0."""
    endings: dict[str, None] = {}
    for name in names:
        *_, parent, last = ["", *name.split(".")]
        endings[f"{parent}.{last}" if last.isdigit() else last] = None
    return list(endings)


def _last_layer(names: Iterable[str]) -> int:
    return max((int(n) for name in names for n in re.findall(r"\.(\d+)\.", name)), default=0)
