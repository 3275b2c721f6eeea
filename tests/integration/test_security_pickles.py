"""No pickle is ever loaded: wherever one could be put, it stays unopened or is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import write_config

from ssm_train.adapters.base import ModelSpec
from ssm_train.adapters.loading import save_model
from ssm_train.adapters.registry import resolve
from ssm_train.checkpoint import MANIFEST, own_digest
from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.durable import digest

LORA = {"peft_type": "LORA", "r": 1, "target_modules": ["in_proj"]}


class Marks:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def raw(mark: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(Marks(mark)))


def zipped(mark: Path, path: Path) -> None:
    torch.save({"weight": Marks(mark)}, path)


def legacy(mark: Path, path: Path) -> None:
    torch.save({"weight": Marks(mark)}, path, _use_new_zipfile_serialization=False)


def array(mark: Path, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([Marks(mark)], dtype=object), allow_pickle=True)


FORMATS = {"raw": raw, "torch": zipped, "legacy": legacy, "numpy": array}
each_format = pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, data, their caches and a finished run of both; never changed."""
    root = tmp_path_factory.mktemp("finished")
    words = "one two three four five six seven eight say =>"
    tokenizer = build_tokenizer([words], {"type": "word"})
    new_model = {"model_type": "mamba", "hidden_size": 8, "state_size": 2, "num_hidden_layers": 1}
    spec = ModelSpec(new_model={**new_model, "vocab_size": len(tokenizer)}, kernels="reference")
    adapter, _ = resolve(spec)
    save_model(adapter.prepare(spec).model, root / "base")
    tokenizer.save_pretrained(root / "base")
    config = write_config(
        root, "tiny", "mamba", new_model=None, tokenizer=None, model="base", peft=LORA, max_steps=2,
        save_steps=1, data="train.jsonl", val_data="val.jsonl", output_root="output",
        cache_dir="cache", save_total_limit=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("ssm_train.record.summary.plot_metrics", lambda run_dirs, out: out)
        assert main(["train", "--cfg", str(config)]) == DONE
    return root


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plot: None) -> Path:
    """A copy of it to plant in, which is the working directory."""
    copy = tmp_path / "place"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    recorded = RUN / "base.json"
    base = json.loads(recorded.read_text()) | {"directory": str(copy / "base")}
    recorded.write_text(json.dumps(base))
    return copy


RUN = Path("output/train_seed42/tiny")
RESUME = ["train", "--cfg", "tiny.yaml", "--resume", "max_steps=3", "save_steps=3"]
COMMANDS = {
    "resume": RESUME,
    "eval": ["eval", str(RUN), "--device", "cpu"],
    "eval last": ["eval", str(RUN), "--device", "cpu", "--checkpoint", "last"],
    "generate": ["generate", str(RUN), "--device", "cpu", "--prompt", "one", "--max-new-tokens=1"],
    "merge": ["merge", str(RUN), "--out", "merged"],
    "train": ["train", "--cfg", "tiny.yaml", "name=again"],
}


def last_checkpoint() -> Path:
    return RUN / "checkpoints" / (RUN / "checkpoints/last").read_text().strip()


def sign(checkpoint: Path) -> None:
    """A manifest that vouches for what is there now."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        path = checkpoint / name
        entry.update(size=path.stat().st_size, sha256=digest(path))
    text = json.dumps({**manifest, "sha256": own_digest(manifest)})
    (checkpoint / MANIFEST).write_text(text)


@each_format
def test_the_pickles_of_these_tests_would_execute(
    write: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    mark, path = tmp_path / "executed", tmp_path / "pickle"
    write(mark, path)
    if write is array:
        np.load(path, allow_pickle=True)
    elif write is raw:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists()


NEXT_TO_A_RUN = [
    *("pytorch_model.bin", "model.pkl", "adapter/adapter_model.bin", "adapter/pytorch_model.bin"),
    *("adapter/training_args.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"),
    *("{step}/optimizer.pt", "{step}/rng_state.pth", "{step}/random_states_0.pkl"),
    *("{step}/custom_checkpoint_0.pkl", "{step}/pytorch_model.bin", "{step}/scheduler.bin"),
    *("{step}/global_step2/mp_rank_00_model_states.pt", "global_step2/zero_pp_rank_0_optim.pt"),
    *("checkpoints/global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",),
]
NEXT_TO_THE_INPUTS = [
    *("base/training_args.bin", "base/vocab.pkl", "base/tokenizer.pkl", "base/optimizer.pt"),
    *("base/flax_model.msgpack", "base/model.ckpt.index"),
    *("train.pkl", "cache-0123456789abcdef.arrow", "cache/train.pkl", "train.npy", "dataset.pt"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_pickles_beside_the_files_of_a_run_are_not_opened(place: Path, command: str) -> None:
    mark = place / "executed"
    step = last_checkpoint()
    planted = [RUN / name.format(step=step.relative_to(RUN)) for name in NEXT_TO_A_RUN]
    planted += [Path(name) for name in NEXT_TO_THE_INPUTS]
    for number, path in enumerate(planted):
        path.parent.mkdir(parents=True, exist_ok=True)
        list(FORMATS.values())[number % 3](mark, path)
    for directory in (RUN, step, RUN / "checkpoints"):  # as DeepSpeed names what it would load
        (directory / "latest").write_text("global_step2")
    assert main(COMMANDS[command]) == DONE
    assert not mark.exists()


@each_format
@pytest.mark.parametrize(
    "name", ["trainable.safetensors", "optimizer.safetensors", "state.json", "rng-00000.json"]
)
def test_a_pickle_in_place_of_a_checkpoint_s_file_is_refused(
    place: Path, name: str, write: Callable[[Path, Path], None]
) -> None:
    mark, step = place / "executed", last_checkpoint()
    write(mark, step / name)
    sign(step)
    assert main(RESUME) == BAD_INPUT
    assert main(COMMANDS["eval last"]) == BAD_INPUT
    assert not mark.exists()


@each_format
@pytest.mark.parametrize(
    ("name", "command"),
    [
        (str(RUN / "adapter/adapter_model.safetensors"), "eval"),
        (str(RUN / "adapter/adapter_config.json"), "generate"),
        (str(RUN / "peft.json"), "eval last"),
        (str(RUN / "base.json"), "merge"),
        (str(RUN / "cfg.yaml"), "resume"),
        ("base/model.safetensors", "train"),
        ("base/config.json", "train"),
        ("base/tokenizer.json", "train"),
        ("base/tokenizer_config.json", "train"),
        ("val.jsonl", "train"),
        ("tiny.yaml", "train"),
    ],
)
def test_a_pickle_in_place_of_another_file_is_refused(
    place: Path, name: str, command: str, write: Callable[[Path, Path], None]
) -> None:
    mark = place / "executed"
    write(mark, place / name)
    assert main(COMMANDS[command]) == BAD_INPUT
    assert not mark.exists()


@each_format
@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_weights_that_are_a_pickle_alone_are_refused(
    place: Path, kind: str, write: Callable[[Path, Path], None]
) -> None:
    """The only file of weights is the old kind, which may be read as tensors alone."""
    mark = place / "executed"
    if kind == "base":
        (place / "base/model.safetensors").unlink()
        write(mark, place / "base/pytorch_model.bin")
        assert main(COMMANDS["train"]) == BAD_INPUT
    else:
        (RUN / "adapter/adapter_model.safetensors").unlink()
        write(mark, RUN / "adapter/adapter_model.bin")
        assert main(COMMANDS["eval"]) == BAD_INPUT
    assert not mark.exists()


@each_format
def test_safetensors_win_over_a_pickle(place: Path, write: Callable[[Path, Path], None]) -> None:
    mark = place / "executed"
    write(mark, place / "base/pytorch_model.bin")
    assert main(COMMANDS["train"]) == DONE
    assert main(COMMANDS["eval"]) == BAD_INPUT  # the base is not the one of that run any more
    assert not mark.exists()


@pytest.mark.parametrize("write", [raw, zipped, legacy])
def test_mamba_ssm_weights_are_read_as_tensors_alone(
    place: Path, write: Callable[[Path, Path], None]
) -> None:
    mark = place / "executed"
    (place / "base/model.safetensors").unlink()
    write(mark, place / "base/pytorch_model.bin")
    original = {"d_model": 8, "n_layer": 1, "vocab_size": 16}
    (place / "base/config.json").write_text(json.dumps(original))
    assert main(COMMANDS["train"]) == BAD_INPUT
    assert not mark.exists()


@each_format
def test_a_pickle_in_the_cache_of_tokens_is_made_again_or_refused(
    place: Path, write: Callable[[Path, Path], None]
) -> None:
    mark = place / "executed"
    (directory,) = Path("cache/tokens").glob("train-*")
    write(mark, directory / "examples.arrow")
    assert main(COMMANDS["train"]) == DONE  # its hash is not the manifest's: made again
    write(mark, directory / "examples.arrow")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["sha256"] = digest(directory / "examples.arrow")
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert main([*COMMANDS["train"], "--overwrite"]) == BAD_INPUT
    write(mark, directory / "manifest.json")
    assert main([*COMMANDS["train"], "--overwrite"]) == DONE
    assert not mark.exists()


@each_format
@pytest.mark.parametrize("suffix", [".pkl", ".npy", ".pt", ".arrow", ".bin", ".parquet", ".json"])
def test_a_pickle_as_data_is_refused(
    place: Path, suffix: str, write: Callable[[Path, Path], None]
) -> None:
    mark, path = place / "executed", place / f"mine{suffix}"
    write(mark, path)
    assert main([*COMMANDS["train"], f"data={path.name}"]) == BAD_INPUT
    assert not mark.exists()
