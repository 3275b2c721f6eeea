"""Which adapter a model gets, and what is said where none fits or the files are not in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig

from ssm_train.adapters import loading, registry
from ssm_train.adapters.base import ModelSpec
from ssm_train.errors import InputError

ORIGINAL = {"d_model": 16, "n_layer": 2, "vocab_size": 50, "ssm_cfg": {}}


def write_config(directory: Path, config: Any) -> str:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    return str(directory)


@pytest.mark.parametrize(
    ("name", "config", "family", "reason"),
    [
        ("gla-lookalike", {"model_type": "mamba"}, "mamba", "model_type mamba"),
        ("m", {"model_type": "mamba2"}, "mamba2", "model_type mamba2"),
        ("m", {"model_type": "gla"}, "gla", "model_type gla"),
        ("m", ORIGINAL, "mamba", "mamba_ssm's own"),
        ("m", ORIGINAL | {"ssm_cfg": {"layer": "Mamba2"}}, "mamba2", "mamba_ssm's own"),
        ("runs/douglas/mamba-130m", ORIGINAL, "mamba", "mamba_ssm's own"),
    ],
)
def test_a_directory_is_routed_by_its_config(
    tmp_path: Path, name: str, config: dict[str, Any], family: str, reason: str
) -> None:
    found, why = registry.choose_family(ModelSpec(model=write_config(tmp_path / name, config)))
    assert found == family and reason in why


def test_an_explicit_adapter_comes_first_and_the_name_last(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "m", {"model_type": "mamba"})
    assert registry.choose_family(ModelSpec(model=directory, adapter="mamba2"))[0] == "mamba2"
    # No config can be read for these: the network is off in tests.
    for name, family in {"fla-hub/GLA-1B": "gla", "state-spaces/mamba-130m": "mamba"}.items():
        found, why = registry.choose_family(ModelSpec(model=name))
        assert found == family and "by its name alone" in why
    new = ModelSpec(new_model={"model_type": "mamba2"})
    adapter, why = registry.resolve(new)
    assert adapter.name == "mamba2" and why == "mamba2: new_model has model_type mamba2"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "jamba"}, ["'jamba'", "relative", "supported: mamba, mamba2, gla"]),
        ({"model_type": "falcon_mamba"}, ["'falcon_mamba'", "relative"]),
        ({"model_type": "manba"}, ["'manba'", "did you mean 'mamba'"]),
        ({"hidden_size": 3}, ["neither a model_type nor", "adapter:"]),
        (ORIGINAL | {"ssm_cfg": {"layer": "Mamba3"}}, ["'Mamba3'"]),
        ("{bad", ["config.json is not JSON", "line 1"]),
    ],
)
def test_what_cannot_be_routed_is_one_line(tmp_path: Path, config: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        registry.resolve(ModelSpec(model=write_config(tmp_path / "m", config)))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_missing_places_and_names(tmp_path: Path) -> None:
    for spec, words in (
        (ModelSpec(model=str(tmp_path / "nowhere")), "there is no directory"),
        (ModelSpec(model=str(tmp_path)), "has no config.json"),
        (ModelSpec(), "give `model`, or `new_model`"),
        (ModelSpec(new_model={"hidden_size": 8}), "with its model_type"),
        (ModelSpec(model="x/y", adapter="manba"), "did you mean 'mamba'"),
    ):
        with pytest.raises(InputError, match=words):
            registry.resolve(spec)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        loading.read_config("state-spaces/mamba-130m-hf-that-is-not-here")


def test_gla_without_fla_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install 'flash-linear-attention"):
        registry.resolve(ModelSpec(new_model={"model_type": "gla"}))


def test_the_router_imports_no_family() -> None:
    code = (
        "import sys, ssm_train.adapters.registry; "
        "print(*(name in sys.modules for name in ('fla', 'ssm_train.adapters.mamba')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.split() == ["False", "False"]


def test_new_model_keys_and_values_are_checked() -> None:
    for values, words in (
        ({"hiden_size": 8}, "MambaConfig has no 'hiden_size'; did you mean 'hidden_size'"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
    ):
        with pytest.raises(InputError, match=words) as error:
            loading.make_config(MambaConfig, values)
        assert "\n" not in str(error.value)


def test_tokenizers_own_default_missing_and_without_an_end(
    tmp_path: Path, write_tokenizer: Callable[..., None]
) -> None:
    bare = write_config(tmp_path / "bare", {"model_type": "mamba"})
    own, endless = tmp_path / "own", tmp_path / "endless"
    for directory in (own, endless):
        write_config(directory, {"model_type": "mamba"})
    write_tokenizer(own, size=20)
    write_tokenizer(endless, eos=False)

    assert loading.load_tokenizer(ModelSpec(new_model={"model_type": "mamba"})) is None
    tokenizer = loading.load_tokenizer(ModelSpec(model=str(own)), default=str(endless))
    assert len(tokenizer) == 20 and tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert len(loading.load_tokenizer(ModelSpec(model=bare), default=str(own))) == 20
    assert len(loading.load_tokenizer(ModelSpec(model=bare, tokenizer=str(own)))) == 20
    # AutoTokenizer would make a tokenizer of two ids from bare's config.json alone.
    for spec, words in (
        (ModelSpec(model=bare), "no tokenizer files"),
        (ModelSpec(model=bare, tokenizer="someone/not-cached"), "someone/not-cached"),
        (ModelSpec(model=str(endless)), "no end-of-text token"),
    ):
        with pytest.raises(InputError, match=words):
            loading.load_tokenizer(spec)


def test_a_tokenizer_larger_than_the_model_is_refused(
    tmp_path: Path, write_tokenizer: Callable[..., None], tiny_model: Callable[..., Any]
) -> None:
    write_tokenizer(tmp_path, size=62)
    tokenizer = loading.load_tokenizer(ModelSpec(tokenizer=str(tmp_path)))
    with pytest.raises(InputError, match="62 ids but this has 61"):
        loading.align_tokenizer(tiny_model("mamba"), tokenizer, "this")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"new_model": {"model_type": "mamba", "hidden_size": -8}}, "MambaConfig cannot be built"),
        ({"new_model": {"model_type": "mamba2", "hidden_size": 8}}, "Inconsistent configuration"),
        (
            {
                "new_model": {
                    "model_type": "mamba2",
                    "hidden_size": 12,
                    "num_heads": 3,
                    "head_dim": 8,
                    "n_groups": 2,
                }
            },
            "num_heads 3 is not a multiple of n_groups 2",
        ),
        ({"new_model": {"model_type": "mamba"}, "kernels": "triton"}, "triton needs a GPU"),
    ],
)
def test_new_models_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    spec = ModelSpec(**changes)
    with pytest.raises(InputError, match=words) as error:
        registry.resolve(spec)[0].prepare(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", ["5.24.0", "5.24.0.dev0", "6.0.1"])
def test_a_transformers_that_decodes_wrongly_is_refused(version: str) -> None:
    with pytest.raises(InputError, match=r"right up to 5\.23 only: pip install"):
        registry.check_transformers(version)


@pytest.mark.parametrize("version", ["5.17.0", "5.23.2"])
def test_a_transformers_that_was_tested_is_taken(version: str) -> None:
    registry.check_transformers(version)
