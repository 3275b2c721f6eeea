"""Tokenized data on disk: made once, named by its content, made again when it is damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssm_train.data import DataSettings, sources
from ssm_train.data.cache import EXAMPLES, MANIFEST, default_cache_dir, describe_files
from ssm_train.data.sources import load_task_data
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError

TASK = {"type": "generation", "prompt": "{a} =>", "label": "{b}"}
WORDS = " ".join(f"w{i}" for i in range(20))


@pytest.fixture
def tokenizer() -> Any:
    return build_tokenizer([f"{WORDS} =>"], {"type": "word"})


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    for split in ("train", "val"):
        rows = [{"a": f"w{i} " * (1 + i % 3), "b": [f"w{i % 7}", "w1"]} for i in range(20)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSettings(data=str(tmp_path), task=TASK, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sources that were tokenized, in order."""
    seen: list[str] = []
    original = sources.encode_records

    def encode_records(encoder: Any, records: Any, *rest: Any) -> Any:
        seen.append(records.name)
        return original(encoder, records, *rest)

    monkeypatch.setattr(sources, "encode_records", encode_records)
    return seen


def directories(settings: DataSettings) -> list[Path]:
    return sorted(p for p in Path(settings.cache_dir or "", "tokens").iterdir() if p.is_dir())


def examples(data: Any) -> list[tuple[list[int], list[bool], int]]:
    return [
        (data.example_ids(i).tolist(), data.learnt(i).tolist(), int(data.prompt_lengths[i]))
        for i in range(len(data))
    ]


def test_what_is_read_back_is_what_was_tokenized(settings, tokenizer, encoded, monkeypatch):
    monkeypatch.setattr("ssm_train.data.examples.CHUNK_RECORDS", 6)
    limited = settings.model_copy(update={"max_length": 5})
    first = {split: load_task_data(limited, tokenizer, split) for split in ("train", "val")}
    assert len(encoded) == 2 and len(first["train"].chunks) == 4
    again = {split: load_task_data(limited, tokenizer, split) for split in ("train", "val")}
    assert len(encoded) == 2, "tokenized twice"
    direct = sources.encode_records(
        sources.make_encoder(first["train"].task, tokenizer, training=True, max_length=5),
        sources.find_source(limited, "train").open(),
    )
    assert examples(again["train"]) == examples(first["train"])
    assert [c.ids.tolist() for c in again["train"].chunks] == [c.ids.tolist() for c in direct]
    assert again["train"].dropped == 6 and again["val"].dropped == 0
    assert again["val"].references(3) == ("w3", "w1") and len(again["val"]) == 20


def test_ids_are_mapped_not_copied(settings, tokenizer):
    data = load_task_data(settings, tokenizer, "train")
    owner: Any = data.chunks[0].ids
    while isinstance(owner, np.ndarray):
        assert not owner.flags.owndata
        owner = owner.base
    assert not data.chunks[0].ids.flags.writeable


CHANGES: dict[str, Callable[[DataSettings], DataSettings]] = {
    "task": lambda s: s.model_copy(update={"task": TASK | {"prompt": "{a} :"}}),
    "limit on length": lambda s: s.model_copy(update={"max_length": 4}),
    "packing's limit": lambda s: s.model_copy(update={"packing": True, "tokens_per_batch": 16}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_other_data(settings, tokenizer, encoded, change):
    load_task_data(settings, tokenizer, "train")
    load_task_data(CHANGES[change](settings), tokenizer, "train")
    assert len(encoded) == 2 and len(directories(settings)) == 2


def test_another_file_content_or_tokenizer_is_other_data(settings, tokenizer, encoded):
    load_task_data(settings, tokenizer, "train")
    load_task_data(settings, build_tokenizer([f"{WORDS} => x"], {"type": "word"}), "train")
    assert len(encoded) == 2
    file = Path(settings.data, "train.jsonl")
    file.write_text(file.read_text().replace("w19", "w18"))
    load_task_data(settings, tokenizer, "train")
    assert len(encoded) == 3


def test_the_same_data_elsewhere_is_the_same(settings, tokenizer, encoded, tmp_path):
    load_task_data(settings, tokenizer, "train")
    os.utime(Path(settings.data, "train.jsonl"), (0, 0))
    moved = tmp_path / "moved"
    moved.mkdir()
    for split in ("train", "val"):
        Path(settings.data, f"{split}.jsonl").rename(moved / f"{split}.jsonl")
    elsewhere = settings.model_copy(update={"data": str(moved), "num_data_workers": 0})
    load_task_data(elsewhere, tokenizer, "train")
    assert len(encoded) == 1 and len(directories(settings)) == 1


def test_a_file_in_another_folder_is_other_data(tmp_path):
    """A class may be the name of a folder."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_text("x")
    files = (tmp_path / "a" / "1.png", tmp_path / "b" / "1.png")
    before = describe_files(files)
    (tmp_path / "b").rename(tmp_path / "c")
    assert describe_files((files[0], tmp_path / "c" / "1.png")) != before


def flip_a_bit(directory: Path) -> None:
    data = bytearray((directory / EXAMPLES).read_bytes())
    data[len(data) // 2] ^= 1
    (directory / EXAMPLES).write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flip_a_bit,
    "cut off": lambda d: os.truncate(d / EXAMPLES, 100),
    "examples gone": lambda d: (d / EXAMPLES).unlink(),
    "manifest gone": lambda d: (d / MANIFEST).unlink(),
    "manifest torn": lambda d: (d / MANIFEST).write_text("{"),
    "manifest of another shape": lambda d: (d / MANIFEST).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_is_made_again_with_a_warning(settings, tokenizer, encoded, damage):
    whole = examples(load_task_data(settings, tokenizer, "train"))
    (directory,) = directories(settings)
    DAMAGE[damage](directory)
    said: list[str] = []
    assert examples(load_task_data(settings, tokenizer, "train", say=said.append)) == whole
    assert len(encoded) == 2
    assert said and all(line.startswith("warning: tokenized data in") for line in said)
    load_task_data(settings, tokenizer, "train", say=said.append)
    assert len(encoded) == 2


def test_a_build_that_fails_leaves_nothing_behind(settings, tokenizer):
    with Path(settings.data, "train.jsonl").open("a") as file:
        file.write('{"a": "w1"}\n')
    with pytest.raises(InputError, match="train.jsonl:21: no field 'b'"):
        load_task_data(settings, tokenizer, "train")
    names = [p.name for p in Path(settings.cache_dir or "", "tokens").iterdir()]
    assert not [name for name in names if not name.endswith(".tmp")]
    with pytest.raises(InputError, match="train.jsonl:21"):
        load_task_data(settings, tokenizer, "train")


def test_two_builders_at_a_time_make_it_once(settings, tokenizer, encoded, monkeypatch):
    """The second is another process, as another run of a suite would be."""
    slow = sources.encode_records
    started, go_on = threading.Event(), threading.Event()

    def encode_slowly(*arguments: Any) -> Any:
        started.set()
        assert go_on.wait(60)
        return slow(*arguments)

    monkeypatch.setattr(sources, "encode_records", encode_slowly)
    tokenizer.save_pretrained(Path(settings.data, "tokenizer"))
    program = """
import sys
from transformers import AutoTokenizer
from ssm_train.data import DataSettings
from ssm_train.data.sources import load_task_data
settings = DataSettings.model_validate_json(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
say = lambda line: print(line, flush=True)
print(len(load_task_data(settings, tokenizer, "train", say=say)), flush=True)
"""
    # The tokenizer of both processes comes from the same files, so that its key is one.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(settings.data, "tokenizer"))
    mine = threading.Thread(target=load_task_data, args=(settings, tokenizer, "train"))
    mine.start()
    assert started.wait(60)
    other = subprocess.Popen(
        [sys.executable, "-c", program, settings.model_dump_json(), settings.data + "/tokenizer"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert "waiting for the tokenized data of another run" in other.stdout.readline()
    go_on.set()
    mine.join(60)
    assert other.stdout.read().strip() == "20" and other.wait(60) == 0
    assert len(encoded) == 1 and len(directories(settings)) == 1


def test_a_directory_that_cannot_be_written(settings, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    blocked = settings.model_copy(update={"cache_dir": str(tmp_path / "file")})
    with pytest.raises(InputError, match="cache_dir: .* cannot be written: .*; set cache_dir"):
        load_task_data(blocked, tokenizer, "train")


def test_generated_data_is_not_kept(settings, tokenizer):
    generated = settings.model_copy(update={"data": "quickstart", "task": None})
    load_task_data(generated, tokenizer, "train", limit=3)
    assert not Path(settings.cache_dir or "").exists()


def test_the_default_is_in_the_user_s_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/ssm_train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "ssm_train"
