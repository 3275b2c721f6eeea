"""Which PEFT method a run uses and with which settings: the JSON, then the overrides.
Everything here is checked before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ssm_train.adapters.base import GLA_NAMES, PeftMethod
from ssm_train.errors import InputError, near
from ssm_train.explain import show
from ssm_train.peft.lora import LoraMethod, LoraSettings
from ssm_train.peft.registration import CONFIGS
from ssm_train.peft.sd_lora import SdLoraMethod
from ssm_train.peft.tuner import OwnMethod
from ssm_train.settings import Settings
from ssm_train.strict_yaml import read_document

Method = tuple[type[Settings], Callable[[Any], PeftMethod]]

TWO_STAGES = ("SD_LORA", "GLA_SD_LORA")

METHODS: dict[str, Method] = {"LORA": (LoraSettings, LoraMethod)} | {
    name: (
        config_class.tuner.settings_class,
        partial(SdLoraMethod if name in TWO_STAGES else OwnMethod, config_class),
    )
    for name, config_class in CONFIGS.items()
}
"""peft_type -> the settings it takes, the method it is."""

# What PEFT writes into every adapter_config.json; says nothing about how to train.
BOOKKEEPING = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version"),
    *("revision", "runtime_config", "task_type", "modules"),
}

NOTHING = ("none", "full", "false", "no")  # text in YAML 1.2, and no file of that name

OLD_NAMES = {"sdlora": "SD_LORA"}

PROJECTION_KEYS = {
    "r": "proj_lora_r",
    "lora_alpha": "proj_lora_alpha",
    "lora_dropout": "proj_lora_dropout",
    "target_modules": "lora_targets",
}
"""Key of LoRA -> what it is called where LoRA is the part of SD_LORA on the projections."""


@dataclass(frozen=True)
class PeftSpec:
    """A PEFT method by name and its validated settings."""

    peft_type: str
    settings: Settings
    source: str
    """Where the settings were read, for messages."""

    def make(self) -> PeftMethod:
        """The method, ready to be injected into one model."""
        return METHODS[self.peft_type][1](self.settings)

    @property
    def needs_whole_model(self) -> bool:
        """Whether the method looks at gradients or weights of the model in a stage before the
        last, so that each process needs all of them."""
        data = isinstance(self.settings, LoraSettings) and self.settings.starts_from_data
        return data or self.peft_type in TWO_STAGES

    def dump(self) -> dict[str, Any]:
        """The settings that are no defaults, by their JSON names; `load_peft` reads them back."""
        return {"peft_type": self.peft_type, **self.settings.model_dump(exclude_defaults=True)}


def load_peft(
    peft: str | Path | Mapping[str, Any] | None,
    overrides: Mapping[str, Any] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> PeftSpec | None:
    """Reads a PEFT JSON (or takes its mapping) and lays the overrides over it.

    `overrides` holds settings by their JSON name, as the HP_* variables set them, and
    `pissa_fast`; `provenance` says where ("peft_overrides.r" -> "HP_PEFT_R"). None for `peft` is
    full fine-tuning: the result is None. Raises InputError.
    """
    if peft is None:
        return None
    if isinstance(peft, Mapping):
        source, values = "peft", dict(peft)
    else:
        source, values = str(peft), _read_file(Path(peft))
    places = provenance or {}
    changes = {key: value for key, value in (overrides or {}).items() if value is not None}
    written, override = values.pop("peft_type", None), changes.pop("peft_type", None)
    if override is None:
        peft_type = _method_name(source, written)
    else:
        peft_type = _method_name(places.get("peft_overrides.peft_type", "peft_overrides"), override)
    if peft_type in TWO_STAGES:
        if override is not None and _method_name(source, written) == "LORA":
            peft_type, values = _as_sparse(source, peft_type, values)
        renamed = {f"peft_overrides.{k}": f"peft_overrides.{v}" for k, v in PROJECTION_KEYS.items()}
        places = {renamed.get(key, key): where for key, where in places.items()}
        changes = {PROJECTION_KEYS.get(key, key): value for key, value in changes.items()}
    schema = METHODS[peft_type][0]
    if peft_type == "LORA":
        values = _without_inert_keys(source, values)
        values, changes = _apply_pissa_fast(values, changes)
    else:
        values = {key: value for key, value in values.items() if key not in BOOKKEEPING}
    for key in changes:
        if key not in schema.model_fields:
            raise InputError(f"{_name(key, places)} has no meaning for peft_type {peft_type}")
    try:
        settings = schema.model_validate(values | changes)
    except ValidationError as error:
        names = {key: _name(key, places) for key in changes}
        raise InputError(_explain(error, source, peft_type, schema, names)) from None
    return PeftSpec(peft_type, settings, source)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return {str(key): value for key, value in read_document(path).values.items()}
    except InputError as error:
        hint = "; for full fine-tuning write null" if str(path).lower() in NOTHING else ""
        raise InputError(f"peft: {error}{hint}") from None


def _name(key: str, places: Mapping[str, str]) -> str:
    """An override in messages, with where it was set."""
    where = places.get(f"peft_overrides.{key}")
    return f"{where}: {key}" if where else f"peft_overrides.{key}"


def _method_name(where: str, given: Any) -> str:
    """The method's name in METHODS. Raises InputError for unknown ones."""
    exists = f"there is {', '.join(METHODS)}"
    if given is None:
        raise InputError(f"{where}: peft_type is missing; {exists}")
    name = OLD_NAMES.get(str(given).lower(), str(given).upper())
    if name == "SSM_LORA":  # how an exported adapter calls LoRA
        name = "LORA"
    if name not in METHODS:
        raise InputError(f"{where}: unknown peft_type {given!r}; {exists}{near(name, METHODS)}")
    return name


def _without_inert_keys(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without PEFT's bookkeeping and without its other options at their defaults."""
    from dataclasses import MISSING, fields

    from peft import LoraConfig

    inert: dict[str, list[Any]] = {}
    for field in fields(LoraConfig):
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        inert[field.name] = [None, default]
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if key in BOOKKEEPING:
            continue
        if key in LoraSettings.model_fields:
            if value is not None:
                kept[key] = value
        elif key not in inert:
            raise InputError(f"{source}: unknown key {key!r} for peft_type LORA{near(key, inert)}")
        elif value not in inert[key]:
            raise InputError(
                f"{source}: {key} is {value!r}, an option of PEFT that is not supported here; "
                "remove it"
            )
    return kept


def _as_sparse(
    source: str, peft_type: str, values: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """A LoRA JSON as one of SD_LORA (of GLA_SD_LORA where it names GLA's modules), whose part on
    the projections it is; HP_PEFT_TYPE=sdlora means that."""
    kept = _without_inert_keys(source, values)
    for key, value in kept.items():
        if key not in PROJECTION_KEYS and value != LoraSettings.model_fields[key].get_default():
            raise InputError(f"{source}: {key} is {value!r}, which {peft_type} does not have")
    if re.search(GLA_NAMES, str(kept.get("target_modules"))):
        peft_type = "GLA_SD_LORA"
    renamed = {PROJECTION_KEYS[key]: v for key, v in kept.items() if key in PROJECTION_KEYS}
    return peft_type, renamed


def _apply_pissa_fast(
    values: dict[str, Any], changes: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    fast = changes.pop("pissa_fast", False)
    if fast and "init_lora_weights" not in changes and values.get("init_lora_weights") == "pissa":
        values = values | {"init_lora_weights": "pissa_niter_4"}
    return values, changes


def _explain(
    error: ValidationError,
    source: str,
    peft_type: str,
    schema: type[Settings],
    names: Mapping[str, str],
) -> str:
    """One line per problem: where, which key, its value, what was wrong with it; `names`: of
    overrides."""
    lines: dict[str, None] = {}
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        if not path:  # two settings that contradict each other
            lines[f"{source}: {item['msg'].removeprefix('Value error, ')}"] = None
            continue
        key = path[0]
        where = names.get(key, f"{source}: {key}")
        if item["type"] == "extra_forbidden":
            hint = near(key, schema.model_fields)
            lines[f"{source}: unknown key {key!r} for peft_type {peft_type}{hint}"] = None
        else:
            what = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            lines[f"{where} is {show(item['input'])}, but {what}"] = None
    return "\n".join(lines)
