"""Bombs end in one line, code that a checkpoint brings never runs, and the hub's commits are
written down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import write_config

from ssm_train.adapters.base import ModelSpec
from ssm_train.adapters.loading import save_model
from ssm_train.adapters.registry import resolve
from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError
from ssm_train.peft.export import load_adapter
from ssm_train.strict_yaml import MAX_BYTES, read_document

LORA = {"peft_type": "LORA", "r": 1, "target_modules": ["in_proj"]}
LAUGHS = "a: &a [ha, ha]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
BOMBS = {
    "billion laughs": ("run.yaml", LAUGHS, "anchors and aliases"),
    "billion laughs as keys": ("run.yaml", "&a a: &b {*a : *b}\n", "anchors and aliases"),
    "deep YAML": ("run.yaml", "a: " + "[" * 400_000, "levels deep"),
    "deep YAML in blocks": ("run.yaml", "- " * 40_000, "levels deep"),
    "deep JSON": ("run.json", "[" * 400_000 + "]" * 400_000, "levels deep"),
    "deep JSON mappings": ("run.json", '{"a":' * 100_000, "levels deep"),
    "large YAML": ("run.yaml", "#" * (MAX_BYTES + 1), "at most"),
    "large JSON": ("run.json", '{"a": "' + "x" * MAX_BYTES + '"}', "at most"),
    "long number": ("run.yaml", "seed: " + "9" * 100_000, "digits"),
    "long number in JSON": ("run.json", '{"seed": ' + "9" * 100_000 + "}", "digits"),
    "python object": ("run.yaml", "data: !!python/object/apply:os.abort []", "tags"),
    "control characters": ("run.yaml", "data: \x00", "not valid YAML"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_ends_in_one_line(
    bomb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, text, expected = BOMBS[bomb]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert main(["train", "--cfg", str(path)]) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and expected in said, said[:300]


def test_a_bomb_as_peft_settings_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "peft.json").write_text('{"peft_type": ' + "[" * 100_000)
    with pytest.raises(InputError, match="levels deep"):
        read_document(tmp_path / "peft.json")


# ---------------------------------------------------------------- code of a checkpoint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model's directory with code that leaves a mark when it is imported."""
    tokenizer = build_tokenizer(
        ["one two three four five six seven eight say =>"], {"type": "word"}
    )
    new_model = {"model_type": "mamba", "hidden_size": 8, "state_size": 2, "num_hidden_layers": 1}
    spec = ModelSpec(new_model={**new_model, "vocab_size": len(tokenizer)}, kernels="reference")
    adapter, _ = resolve(spec)
    save_model(adapter.prepare(spec).model, tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    code = (
        f"open({str(tmp_path / 'executed')!r}, 'w')\n"
        "class Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
        "def generate(model, *args, **kwargs): pass\n"
    )
    for file in ("remote.py", "custom_generate/generate.py"):
        path = tmp_path / "base" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    return tmp_path / "base"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def config_for(base: Path, directory: Path, **changes: Any) -> Path:
    return write_config(
        directory, "tiny", "mamba", new_model=None, tokenizer=None, model=str(base), peft=LORA,
        max_steps=1, skip_eval=True, eval_steps=None, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("answer", ["y\n", ""])
def test_code_of_a_checkpoint_never_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, apart: bool
) -> None:
    """Not even where the person at the terminal would say yes: nobody is asked."""
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    monkeypatch.chdir(base)  # on the path of imports, as with `python -m`
    names = {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.Model"}
    change(base / "config.json", auto_map=names, architectures=["Model"])
    change(
        base / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["remote.Tokenizer", "remote.Tokenizer"]},
        tokenizer_class="Tokenizer",
    )
    words = []
    if apart:  # a tokenizer's directory of its own, of no known family
        shutil.copytree(base, tmp_path / "words")
        (tmp_path / "words" / "config.json").unlink()
        words = [f"tokenizer={tmp_path / 'words'}"]
    main(["train", "--cfg", str(config_for(base, tmp_path)), *words])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "experts_implementation"]
)
def test_kernels_of_the_hub_are_refused(
    base: Path, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would download and import them, because a file of the model says so."""
    change(base / "config.json", **{key: "somebody/kernel"})
    assert main(["train", "--cfg", str(config_for(base, tmp_path))]) == BAD_INPUT
    said = capsys.readouterr().err
    assert key in said and "never run" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_mapping", {"parent_library": "remote", "base_model_class": "Model"}),
        ("megatron_config", {"megatron_core": "remote"}),
    ],
)
def test_modules_that_an_adapter_names_are_not_imported(
    base: Path, tmp_path: Path, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", "--cfg", str(config_for(base, tmp_path))]) == DONE
    run_dir = tmp_path / "output/train_seed42/tiny"
    change(run_dir / "adapter/adapter_config.json", megatron_core="remote", **{key: value})
    monkeypatch.syspath_prepend(str(base))
    spec = ModelSpec(model=str(base), kernels="reference")
    model = resolve(spec)[0].prepare(spec).model
    with pytest.raises(InputError, match=f"{key} names code"):
        load_adapter(model, run_dir / "adapter")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- commits of the hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_commits_of_the_hub_are_in_the_record(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch moves; what a run was made from is its commit."""
    hub = tmp_path / "hub"
    for kind, name in (("models", "somebody--tiny"), ("datasets", "somebody--data")):
        snapshot = hub / f"{kind}--{name}" / "snapshots" / COMMIT
        (hub / f"{kind}--{name}" / "refs").mkdir(parents=True)
        (hub / f"{kind}--{name}" / "refs" / "main").write_text(COMMIT)
        if kind == "models":
            shutil.copytree(base, snapshot)
        else:
            config = config_for(base, tmp_path)
            snapshot.mkdir(parents=True)
            shutil.copy(tmp_path / "train.jsonl", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(hub))
    assert (
        main(["train", "--cfg", str(config), "model=somebody/tiny", "data=somebody/data"]) == DONE
    )
    record = json.loads((tmp_path / "output/data_seed42/tiny/environment.json").read_text())
    assert record["hub_commits"] == dict.fromkeys(("model", "tokenizer", "data (train)"), COMMIT)
    assert main(["train", "--cfg", str(config)]) == DONE  # files of one's own have no commit
    record = json.loads((tmp_path / "output/train_seed42/tiny/environment.json").read_text())
    assert record["hub_commits"] == {}
