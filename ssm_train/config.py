"""What a run is: one strict, flat config, made of every component's settings; layers defaults
< file < command line < HP_* variables, and where each value came from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from ssm_train.adapters.base import GLA_NAMES, ModelSettings
from ssm_train.checkpoint import CheckpointSettings
from ssm_train.contradictions import find_contradictions
from ssm_train.data import DataSettings
from ssm_train.errors import InputError, whole_number
from ssm_train.evaluate import EvalSettings
from ssm_train.explain import Provenance, explain, find_place
from ssm_train.metrics import MetricsSettings
from ssm_train.optim import OptimSettings
from ssm_train.overrides import (
    DIRECTORIES,
    find_key,
    from_text,
    misspelt_variables,
    read_variables,
    set_at,
)
from ssm_train.schedule import LoopSettings
from ssm_train.secrets import refuse_secrets
from ssm_train.settings import Settings
from ssm_train.strict_yaml import Document, dump, read_document

# The runs that a bare PEFT JSON configures, as `train.py --cfg cfg/peft/lora/x.json` always did:
# Mamba's, or GLA's where the targets are modules of GLA.
MAMBA_RUN = {"model": "state-spaces/mamba-130m", "data": "glue-tvt_cola"}
GLA_RUN = {"model": "fla-hub/gla-1.3B-100B", "data": "glue-tvt_cola"}


class PeftOverrides(Settings):
    """Changes to the PEFT config from HP_* variables; None leaves the config's own value."""

    peft_type: str | None = None
    """PEFT method (HP_PEFT_TYPE)."""
    r: int | None = Field(default=None, ge=1)
    """LoRA rank (HP_PEFT_R)."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha (HP_PEFT_ALPHA)."""
    lora_dropout: float | None = Field(default=None, ge=0, lt=1)
    """LoRA dropout (HP_PEFT_DROPOUT)."""
    init_lora_weights: str | bool | None = None
    """Initialisation (HP_INIT): true, pissa, pissa_niter_4, olora, ..."""
    pissa_fast: bool | None = None
    """HP_PISSA_FAST: "pissa" in the config means "pissa_niter_4"; ignored when HP_INIT is set."""
    use_dora: bool | None = None
    """DoRA (HP_USE_DORA)."""
    use_rslora: bool | None = None
    """rsLoRA (HP_USE_RSLoRA)."""
    loraga_batch_size: int | None = Field(default=None, ge=1)
    """Examples in a LoRA-GA gradient batch (HP_LORAGA_BATCH_SIZE)."""
    loraga_steps: int | None = Field(default=None, ge=1)
    """LoRA-GA gradient batches (HP_LORAGA_STEPS)."""
    loraga_layerwise: bool | None = None
    """LoRA-GA gradients layer by layer (HP_LORAGA_LAYERWISE)."""
    loraga_stable_c: float | None = Field(default=None, gt=0)
    """LoRA-GA scale c (HP_LORAGA_STABLE_C)."""
    num_warmup_it: int | None = Field(default=None, ge=0)
    """SDLoRA warm-up steps (HP_WARMUP_IT)."""
    train_ratio: float | None = Field(default=None, ge=0, le=1)
    """SDLoRA share of trained channels (HP_TRAIN_RATIO)."""
    freeze_ratio: float | None = Field(default=None, ge=0, le=1)
    """SDLoRA share of frozen channels (HP_FREEZE_RATIO)."""
    zero_ratio: float | None = Field(default=None, ge=0, le=1)
    """SDLoRA share of zeroed channels (HP_ZERO_RATIO)."""

    def given(self) -> dict[str, Any]:
        """Only what was set."""
        return self.model_dump(exclude_none=True)


class RunConfig(
    ModelSettings,
    DataSettings,
    OptimSettings,
    LoopSettings,
    EvalSettings,
    CheckpointSettings,
    MetricsSettings,
    Settings,
):
    """A whole run, flat. The keys below are the run's own; the others are the components'."""

    peft: str | dict[str, Any] | None = None
    """Path to a PEFT JSON, or the mapping itself; null: full fine-tuning."""
    peft_overrides: PeftOverrides = PeftOverrides()
    """Changes to `peft`, as the HP_* variables of LoRA make them."""
    name: str | None = None
    """Name of the run and of its directory; null: the config file's stem."""
    output_root: str = "output/benchmark"
    """Directory of all runs; its default is the variable SSM_TRAIN_OUTPUT."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?|\d+)$")
    """auto (a GPU when there is one), cpu, cuda, cuda:1 or just 1, ..."""
    debug: bool = False
    """Train on the first 8 examples, evaluate on the first 2, one epoch."""
    resume: bool = False
    """Go on from the newest valid checkpoint of the run directory."""
    overwrite: bool = False
    """Remove an earlier run of this name first."""
    lock: bool = False
    """Own the run directory from the first moment, and on every host; else while it trains."""


def load_config(
    path: str | Path,
    cli_overrides: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[RunConfig, Provenance]:
    """Reads a run config and lays `key=value` texts and HP_* variables over it.

    `environment` is usually `os.environ`; None: no variables. A `.json` file with `peft_type` is
    a PEFT config, used in the default run of its family. Raises InputError with one line per
    problem.
    """
    path = Path(path)
    document = read_document(path)
    if path.suffix.lower() == ".json" and "peft_type" in document.values:
        document = default_run(document, path)
    return resolve_config(document, path.stem, cli_overrides, environment)


def resolve_config(
    document: Document,
    name: str,
    cli_overrides: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[RunConfig, Provenance]:
    """`load_config` for what was read; `name`: of the run, where the document has none."""
    values: dict[Any, Any] = dict(document.values)
    provenance: Provenance = {str(key): document.where((key,)) for key in values}
    cli_overrides, environment = cli_overrides or {}, environment or {}

    variables = {name: text for name, _, text in read_variables(environment)}
    refuse_secrets(document.source, document.values)  # first, as messages below show values
    refuse_secrets("command line", cli_overrides)
    refuse_secrets("environment", variables)
    for variable, key in DIRECTORIES.items():
        if (text := environment.get(variable)) and key not in values:
            values[key], provenance[key] = text, variable
    for key, text in cli_overrides.items():
        _lay_over(values, provenance, key, text, "command line")
    for variable, key, text in read_variables(environment):
        _lay_over(values, provenance, key, text, variable)
    for one, other in (("resume", "overwrite"), ("overwrite", "resume")):
        of_the_file = one in cli_overrides and other not in cli_overrides and values.get(other)
        if of_the_file and values[one] is True:
            values[other], provenance[other] = False, "command line"

    problems = list(misspelt_variables(environment))
    values["min_eval_metric_after_epoch"] = _number_epochs(
        values.get("min_eval_metric_after_epoch")
    )
    if values.get("name") is None:
        values["name"] = name
    try:
        cfg = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += explain(error, RunConfig, document, provenance)
        raise InputError("\n".join(problems)) from None
    problems += [
        f"{find_place(key, provenance, document.source)}: {problem}"
        for key, problem in find_contradictions(cfg)
    ]
    if problems:
        raise InputError("\n".join(problems))
    for key in RunConfig.model_fields:
        provenance.setdefault(key, "default")
    return cfg, provenance


def read_peft_overrides(environment: Mapping[str, str]) -> dict[str, Any]:
    """What the HP_* variables say of the PEFT config. Raises InputError naming the variable."""
    values: dict[str, Any] = {}
    provenance: Provenance = {}
    for variable, key, text in read_variables(environment):
        _, _, name = key.partition("peft_overrides.")
        if name:
            values[name] = from_text(text, _field(key))
            provenance[name] = variable
    try:
        return PeftOverrides.model_validate(values).given()
    except ValidationError as error:
        problems = explain(error, PeftOverrides, Document("environment", {}, {}), provenance)
        raise InputError("\n".join(problems)) from None


def default_run(peft: Document, path: Path) -> Document:
    """The run of a PEFT JSON that is given as a config."""
    named = [peft.values.get(k) for k in ("peft_type", "target_modules", "trainable_layers")]
    gla = re.search(GLA_NAMES, str(named))
    name, run = ("GLA", GLA_RUN) if gla else ("Mamba", MAMBA_RUN)
    return Document(f"default {name} run", {**run, "peft": str(path)}, {})


def run_directory(cfg: RunConfig, cfg_path: str | Path | None = None) -> Path:
    """`<output root>/<data>_seed<seed>/<name>`; creates nothing.

    A path given as data counts by its stem, a hub name by its last part. Raises InputError when
    a symbolic link would lead out of the output root.
    """
    name = cfg.name or Path(cfg_path or "run").stem
    data = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(cfg.data).stem).lstrip(".")[:100]
    root = Path(cfg.output_root)
    directory = root / f"{data}_seed{cfg.seed}" / name
    if not directory.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"run directory {directory} leads to {directory.resolve()}, outside output_root {root}"
        )
    return directory


def as_recorded(cfg: RunConfig, recorded: RunConfig) -> RunConfig:
    """`tokens_per_batch: auto` is the number that the run's record says, whatever fits now."""
    if cfg.tokens_per_batch != "auto":
        return cfg
    return cfg.model_copy(update={"tokens_per_batch": recorded.tokens_per_batch})


def dump_yaml(cfg: RunConfig) -> str:
    """The resolved config as YAML that `--cfg` takes again.

    Without `resume` and `overwrite`: they say how one launch began, and a config in a run
    directory that removes that directory would be a trap.
    """
    values = cfg.model_dump(exclude={"resume", "overwrite"})
    values["peft_overrides"] = cfg.peft_overrides.given()
    parts = (ModelSettings, DataSettings, OptimSettings, LoopSettings, EvalSettings)
    order = ["name", *(key for part in parts for key in part.model_fields), *values]
    return dump({key: values[key] for key in dict.fromkeys(order)})


def describe_overrides(cfg: RunConfig, provenance: Mapping[str, str]) -> list[str]:
    """One line per value that did not come from a default: `key = value  (where from)`."""
    lines = []
    for key, source in provenance.items():
        if source == "default":
            continue
        value: Any = cfg
        for part in key.split("."):
            value = (
                value[find_key(value, part)] if isinstance(value, dict) else getattr(value, part)
            )
        shown = value if isinstance(value, str) else json.dumps(value, default=str)
        lines.append(f"{key} = {shown}  ({source})")
    return lines


def _field(key: str) -> FieldInfo | None:
    """The schema's field of a dotted key, when it has one."""
    head, _, rest = key.partition(".")
    if head == "peft_overrides" and rest:
        return PeftOverrides.model_fields.get(rest)
    return RunConfig.model_fields.get(head) if not rest else None


def _lay_over(
    values: dict[Any, Any], provenance: Provenance, key: str, text: str, where: str
) -> None:
    """Puts what `text` stands for at the dotted `key`, and notes where it came from."""
    try:
        set_at(values, key, from_text(text, _field(key)))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if lost := next((known for known in provenance if known.startswith(f"{key}.")), None):
        raise InputError(
            f"{where}: {key} would undo {lost} ({provenance[lost]}); leave one of them out"
        )
    provenance[key] = where


def _number_epochs(epochs: Any) -> Any:
    """`{"3": 0.5}` means epoch 3, as JSON and the command line have no number keys; null: none."""
    if not isinstance(epochs, dict):
        return {} if epochs is None else epochs
    numbers = {key: whole_number(key) for key in epochs if isinstance(key, str)}
    return {k if (n := numbers.get(k)) is None else n: v for k, v in epochs.items()}
