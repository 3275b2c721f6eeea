"""Model and adapter directories: whatever their files hold, a model comes of it or an InputError,
and no code of theirs runs."""

from __future__ import annotations

import json
import shutil
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from made_inputs import as_json, attempt, damaged, examples, misspelt, temporary_directory, values

from ssm_train.adapters.base import ModelSpec, Prepared
from ssm_train.adapters.loading import save_model
from ssm_train.adapters.registry import resolve
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.peft.export import export_adapter, load_adapter
from ssm_train.peft.spec import load_peft

ROOT = temporary_directory()
WHOLE, MODEL, MARK = ROOT / "whole", ROOT / "model", ROOT / "executed"
NEW_MODEL = {"model_type": "mamba", "vocab_size": 16, "hidden_size": 8, "state_size": 2,
             "num_hidden_layers": 1}  # fmt: skip


def prepare(**spec: Any) -> Prepared:
    asked = ModelSpec(kernels="reference", **spec)
    adapter, _ = resolve(asked)
    return adapter.prepare(asked)


def write_model() -> None:
    prepared = prepare(new_model=NEW_MODEL)
    save_model(prepared.model, WHOLE)
    build_tokenizer(["a b c d"], {"type": "word"}).save_pretrained(WHOLE)
    code = f"open({str(MARK)!r}, 'w')\nclass C: pass\n"
    (WHOLE / "evil.py").write_text(code)
    method = load_peft({"peft_type": "LORA", "r": 1})
    assert method is not None
    lora = method.make()
    lora.inject(prepared)
    export_adapter(prepared.model, WHOLE / "adapter", base_id=None, traits=prepared.traits)


write_model()
JSONS = ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"]
CONTENT = {name: json.loads((WHOLE / name).read_text()) for name in JSONS}
ADAPTER = json.loads((WHOLE / "adapter/adapter_config.json").read_text())
odd = st.one_of(values, st.sampled_from(["evil.C", ["evil.C", None], "evil/kernel", "evil"]))


def changed(content: dict[str, Any], *more: str) -> st.SearchStrategy[bytes]:
    """The JSON with a few keys of its own, or of `more`, changed; mostly not damaged besides."""
    changes = st.dictionaries(misspelt([*content, *more]), odd, max_size=2)
    text = changes.map(lambda found: as_json({**content, **found}))
    return st.one_of(text.map(str.encode), text.map(str.encode), damaged(text))


def load(name: str, content: bytes) -> Prepared | None:
    shutil.rmtree(MODEL, ignore_errors=True)
    shutil.copytree(WHOLE, MODEL)
    (MODEL / name).write_bytes(content)
    prepared = attempt(lambda: prepare(model=str(MODEL)))
    assert not MARK.exists()
    return prepared


@examples(60)
@given(
    st.sampled_from(JSONS).flatmap(
        lambda name: st.tuples(
            st.just(name), changed(CONTENT[name], "auto_map", "attn_implementation", "dtype")
        )
    )
)
def test_json_of_a_model(file: tuple[str, bytes]) -> None:
    load(*file)


WEIGHTS = (WHOLE / "model.safetensors").read_bytes()


@examples(40)
@given(st.integers(0, len(WEIGHTS) - 1), st.binary(max_size=4), st.booleans())
def test_weights_of_a_model(place: int, noise: bytes, early: bool) -> None:
    at = place % 200 if early else place
    content = WEIGHTS[:at] + noise + WEIGHTS[at + len(noise) :] if noise else WEIGHTS[:at]
    load("model.safetensors", content)


@examples(40)
@given(changed(ADAPTER, "auto_mapping", "megatron_config", "megatron_core", "corda_config"))
def test_json_of_an_adapter(content: bytes) -> None:
    prepared = load("adapter/adapter_config.json", content)
    assert prepared is not None
    attempt(lambda: load_adapter(prepared.model, MODEL / "adapter"))
    assert not MARK.exists()
