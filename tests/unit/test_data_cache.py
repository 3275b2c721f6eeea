"""Tokenized data on disk: made once, named by its content, made again when it is damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssm_train.data import DataSettings, sources
from ssm_train.data.cache import (
    EXAMPLES,
    MANIFEST,
    default_cache_dir,
    describe_code,
    describe_files,
)
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
    monkeypatch.setattr("ssm_train.data.pieces.CHUNK_RECORDS", 6)
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


def test_how_the_tokenizer_was_last_called_is_not_part_of_it(settings, tokenizer, encoded):
    first = examples(load_task_data(settings, tokenizer, "train"))
    tokenizer(["w1 w2", "w3"], padding=True, truncation=True, max_length=1)
    assert tokenizer.backend_tokenizer.padding and tokenizer.backend_tokenizer.truncation
    assert examples(load_task_data(settings, tokenizer, "train")) == first
    assert len(encoded) == 1
    tokenizer.add_tokens(["w1 w2"])
    load_task_data(settings, tokenizer, "train")
    tokenizer.add_special_tokens({"eos_token": "w3"})
    load_task_data(settings, tokenizer, "train")
    assert len(encoded) == 3


def write_piqa(folder: Path) -> None:
    folder.mkdir(parents=True)
    row = {"goal": "w1", "sol1": "w2", "sol2": "w3"}
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 2)
        (folder / f"{split}-labels.lst").write_text("0\n1\n")


def write_mrpc(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = [f"{i % 2}\t{i}\t{i}\tw{i}\tw1" for i in range(9)]
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    (folder / "msr_paraphrase_train.txt").write_text("\n".join([header, *rows]) + "\n")
    (folder / "mrpc_dev_ids.tsv").write_text("1\t1\n2\t2\n")


BESIDE: dict[str, tuple[str, Callable[[Path], None], str, str, str, str]] = {
    "labels of PIQA": ("piqa", write_piqa, "train", "train-labels.lst", "0\n1", "1\n1"),
    "list of MRPC": ("glue-tvt_mrpc", write_mrpc, "train", "mrpc_dev_ids.tsv", "2\t2", "4\t4"),
    "pairs of MRPC": ("glue-tvt_mrpc", write_mrpc, "test", "msr_paraphrase_train.txt", "w2", "w7"),
}
"""Data set, what writes it, split, a file beside those of the split, and a change to it."""


@pytest.mark.parametrize("case", BESIDE)
def test_published_data_depends_on_all_its_files_and_not_on_where_they_are(tmp_path, encoded, case):
    name, write, split, beside, old, new = BESIDE[case]
    words = build_tokenizer([f"{WORDS} A B 0 1"], {"type": "word"})
    write(tmp_path / "a" / ("glue/MRPC" if "mrpc" in name else name))
    values = {"data": name, "cache_dir": str(tmp_path / "cache")}
    before = load_task_data(DataSettings(**values, data_root=str(tmp_path / "a")), words, split)
    (tmp_path / "a").rename(tmp_path / "b")
    settings = DataSettings(**values, data_root=str(tmp_path / "b"))
    assert examples(load_task_data(settings, words, split)) == examples(before)
    assert len(encoded) == 1
    (file,) = (tmp_path / "b").rglob(beside)
    file.write_text(file.read_text().replace(old, new))
    assert examples(load_task_data(settings, words, split)) != examples(before)
    assert len(encoded) == 2


def test_other_code_or_another_version_of_a_library_is_other_data(
    settings, tokenizer, encoded, monkeypatch
):
    load_task_data(settings, tokenizer, "train")
    ours, *libraries = describe_code()
    assert [line.split()[0] for line in libraries] == ["tokenizers", "transformers"]
    for other in (["0" * 64, *libraries], [ours, "tokenizers 9", libraries[1]]):
        monkeypatch.setattr(sources, "describe_code", lambda other=other: other)
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
    assert not list(Path(settings.cache_dir or "", "tokens").iterdir())
    with pytest.raises(InputError, match="train.jsonl:21"):
        load_task_data(settings, tokenizer, "train")


def test_a_builder_that_is_killed_is_no_hindrance(settings, tokenizer, encoded, monkeypatch):
    context = multiprocessing.get_context("fork")  # loads nothing again
    begun = context.Event()

    def stand_still(*_: Any) -> Any:
        begun.set()
        time.sleep(600)
        yield

    with monkeypatch.context() as patch:
        patch.setattr(sources, "encode_records", stand_still)
        builder = context.Process(target=load_task_data, args=(settings, tokenizer, "train"))
        builder.start()
        assert begun.wait(60)
    builder.kill()
    builder.join()
    left = {p.suffix for p in Path(settings.cache_dir or "", "tokens").iterdir()}
    assert left == {".lock", ".tmp"}
    assert len(load_task_data(settings, tokenizer, "train")) == 20 and len(encoded) == 1
    assert list(Path(settings.cache_dir or "", "tokens").iterdir()) == directories(settings)


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
    for name in ("file", "x" * 300):  # the latter cannot even be looked for, as a closed one
        blocked = settings.model_copy(update={"cache_dir": str(tmp_path / name)})
        with pytest.raises(InputError, match="cache_dir: .* cannot be written: .*; set cache_dir"):
            load_task_data(blocked, tokenizer, "train")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} cannot be read: Is a directory"):
        describe_files((tmp_path,))


def test_examples_that_are_gone_for_another_process(settings, tokenizer):
    """On a machine that does not share the directory, or in the middle of a copy."""

    def make_elsewhere(work: Callable[[], None]) -> None:
        work()
        (directory,) = directories(settings)
        (directory / EXAMPLES).write_bytes(b"ARROW1")

    with pytest.raises(InputError, match="cannot be read by this process .* all machines share"):
        load_task_data(settings, tokenizer, "train", once=make_elsewhere)


def test_what_is_unused_for_long_is_removed_when_other_data_is_made(settings, tokenizer, encoded):
    def age(directory: Path, days: float) -> None:
        then = time.time() - days * 24 * 3600
        os.utime(directory, (then, then))

    data = load_task_data(settings, tokenizer, "train")
    before = examples(data)
    (train,) = directories(settings)
    mine = train.parent / "train-of-my-own"
    mine.mkdir()
    age(mine, 400)
    age(train, 91)
    load_task_data(settings, tokenizer, "train")  # which is a use
    load_task_data(settings, tokenizer, "val")
    assert train.is_dir() and len(encoded) == 2
    (val,) = set(directories(settings)) - {train, mine}
    age(train, 91)
    age(val, 89)
    load_task_data(settings, tokenizer, "train", limit=5)
    assert not train.exists() and val.is_dir() and mine.is_dir()
    assert examples(data) == before  # of a run that still uses it
    assert len(load_task_data(settings, tokenizer, "train")) == 20 and len(encoded) == 4


def test_generated_data_is_not_kept(settings, tokenizer):
    generated = settings.model_copy(update={"data": "quickstart", "task": None})
    load_task_data(generated, tokenizer, "train", limit=3)
    assert not Path(settings.cache_dir or "").exists()


def test_the_default_is_in_the_user_s_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/ssm_train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "ssm_train"
