"""Every config in cfg/ can be read, and its PEFT targets are modules of its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ssm_train.adapters import registry
from ssm_train.adapters.base import ModelSpec
from ssm_train.config import RunConfig, load_config, run_directory
from ssm_train.data.sources import find_task, load_task_data, training_texts
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.peft.coverage import measure_coverage
from ssm_train.peft.spec import load_peft

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "cfg").rglob("*")
    if path.suffix in (".yaml", ".yml", ".json")
)
# Runs whose model is another run's: they need no download.
ON_OUR_BASES = [
    f"cfg/{directory}/{family}_lora.yaml"
    for directory in ("dart", "quickstart", "sst2")
    for family in ("gla", "mamba")
]


def read(path: str) -> RunConfig:
    return load_config(path)[0]


def base_of(cfg: RunConfig) -> RunConfig:
    """The run that makes the model which `cfg` starts from."""
    assert cfg.model is not None
    return read(cfg.model)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # configs name one another from there


@pytest.mark.parametrize("path", CONFIGS)
def test_a_config_reads(path: str) -> None:
    cfg = read(path)
    load_peft(cfg.peft, cfg.peft_overrides.given())
    if isinstance(cfg.tokenizer, dict):
        build_tokenizer(["a text"], cfg.tokenizer)
    if cfg.task is not None:
        find_task(cfg)


@pytest.mark.parametrize("path", CONFIGS)
def test_a_config_names_no_machine(path: str) -> None:
    cfg = read(path)
    named = [cfg.data, cfg.val_data, cfg.test_data, cfg.model, cfg.output_root]
    assert not [name for name in named if name and Path(name).is_absolute()]


def test_every_run_has_a_directory_of_its_own() -> None:
    runs = [path for path in CONFIGS if not path.endswith(".json")]
    assert len({run_directory(read(path), path) for path in runs}) == len(runs) >= 8


@pytest.mark.parametrize("path", ON_OUR_BASES)
def test_lora_reaches_every_projection(
    path: str, tmp_path: Path, write_tokenizer: Callable[..., None]
) -> None:
    cfg = read(path)
    write_tokenizer(tmp_path)
    spec = ModelSpec(new_model=base_of(cfg).new_model, tokenizer=str(tmp_path))
    adapter, _ = registry.resolve(spec)
    prepared = adapter.prepare(spec)
    peft = load_peft(cfg.peft, cfg.peft_overrides.given())
    assert peft is not None
    peft.make().inject(prepared)  # raises for a name that matches nothing
    coverage = measure_coverage(prepared.model)
    assert coverage.adapted == coverage.linear_layers > 0


@pytest.mark.parametrize("path", ["cfg/sst2/gla_lora.yaml", "cfg/sst2/mamba_lora.yaml"])
def test_the_base_knows_the_label_words(path: str, tmp_path: Path) -> None:
    """The tokenizer is the base's: it must have the words of a task that it was not built for."""
    records = [{"sentence": "a fine film", "label": 1}, {"sentence": "a dull one", "label": 0}]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    cfg = read(path).model_copy(update={"data": str(data)})
    base = base_of(cfg).model_copy(update={"data": str(data)})
    assert isinstance(base.tokenizer, dict)
    tokenizer = build_tokenizer(training_texts(base), base.tokenizer)
    examples = load_task_data(cfg, tokenizer, "train")
    words = tokenizer.convert_ids_to_tokens([int(i) for i in examples.class_ids])
    assert words == ["0", "1"]
    prompts = [i for n in range(len(examples)) for i in examples.prompt_ids(n).tolist()]
    assert tokenizer.unk_token_id not in prompts
