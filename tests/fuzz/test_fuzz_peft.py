"""PEFT JSONs: whatever one holds, it is a method that a tiny model takes, or an InputError."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from made_inputs import (
    as_json,
    attempt,
    damaged,
    examples,
    misspelt,
    plausible,
    temporary_directory,
    texts,
    values,
)

from ssm_train.adapters.base import ModelSpec, Prepared
from ssm_train.adapters.registry import resolve
from ssm_train.peft.spec import METHODS, load_peft

PATH = temporary_directory() / "peft.json"
NEW_MODEL = {"model_type": "mamba", "vocab_size": 16, "hidden_size": 8, "state_size": 2,
             "num_hidden_layers": 1}  # fmt: skip
MODULES = ["in_proj", "out_proj", "x_proj", "dt_proj", "conv1d", "A_log", "D", "x_proj_B",
           "x_proj_C", "all-linear", "lm_head", "embeddings", "norm_f", "mixer", ".*",
           "[", "(a+)+$"]  # fmt: skip
names = st.one_of(st.sampled_from(MODULES), texts)
targets = st.one_of(st.lists(names, max_size=3), names, values)


def of_method(peft_type: str) -> st.SearchStrategy[dict[str, Any]]:
    schema = METHODS[peft_type][0]
    named = st.dictionaries(
        st.sampled_from(
            [k for k in schema.model_fields if "module" in k or "target" in k] or ["r"]
        ),
        targets,
        max_size=2,
    )
    return st.builds(
        lambda changes, modules: {"peft_type": peft_type, **changes, **modules},
        plausible(schema),
        named,
    )


configs = st.one_of(
    *map(of_method, METHODS),
    of_method("LORA"),
    st.dictionaries(misspelt(["peft_type", "r"]), values),
)
overrides = st.one_of(
    st.just({}),
    st.dictionaries(
        st.sampled_from(["peft_type", "r", "lora_alpha", "pissa_fast", "train_ratio"]), values,
        max_size=2,
    ),
)  # fmt: skip


@cache
def weights() -> dict[str, Any]:
    return build().model.state_dict()


def build() -> Prepared:
    spec = ModelSpec(new_model=NEW_MODEL, kernels="reference")
    adapter, _ = resolve(spec)
    return adapter.prepare(spec)


@examples(300)
@given(configs, overrides)
def test_mapping(config: dict[str, Any], changes: dict[str, Any]) -> None:
    spec = attempt(lambda: load_peft(config, changes))
    if spec is not None:
        again = load_peft(spec.dump())
        assert again is not None and again.settings == spec.settings


@examples(200)
@given(damaged(configs.map(as_json)))
def test_file(content: bytes) -> None:
    PATH.write_bytes(content)
    attempt(lambda: load_peft(PATH))


@examples(60)
@given(configs)
def test_injection(config: dict[str, Any]) -> None:
    spec = attempt(lambda: load_peft(config))
    if spec is None:
        return
    prepared = build()
    if attempt(lambda: spec.make().inject(prepared) or True):
        assert any(p.requires_grad for p in prepared.model.parameters())
