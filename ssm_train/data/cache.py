"""Tokenized examples kept on disk, named by the content they were made from: built once, mapped
into memory by every process, built again when a byte of them is wrong, removed when unused."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ssm_train.data.records import expand_home
from ssm_train.data.tokens import Chunk
from ssm_train.durable import digest, remove_if_possible, replace_directory
from ssm_train.errors import InputError
from ssm_train.lock import InUse, own

EXAMPLES, MANIFEST = "examples.arrow", "manifest.json"
TOKENS = {
    "ids": pa.list_(pa.int32()),
    "learnt": pa.list_(pa.uint8()),
    "prompt_length": pa.int64(),
}
ANSWERS = {"references": pa.list_(pa.string()), "context": pa.string()}
LEFT_OUT = ("dropped", "blank", "first_blank")
ANOTHER_LOOK_SECONDS = 0.5
KEPT_SECONDS = 90 * 24 * 3600  # longer than any run: on a network disk it may be another host's


@dataclass(frozen=True)
class TokenCache:
    """One split's examples below a cache directory."""

    root: Path
    split: str
    made_from: Mapping[str, Any]
    """All that the examples depend on, as JSON values; where the files are is not among it."""

    @property
    def directory(self) -> Path:
        key = json.dumps(self.made_from, sort_keys=True, ensure_ascii=False)
        return self.root / f"{self.split}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"

    def remove_unused(self) -> None:
        """Removes what no run has begun with for KEPT_SECONDS; on this host one that has goes on
        with what it mapped."""
        for directory in self.root.glob(f"*-{'[0-9a-f]' * 20}"):
            with suppress(OSError):  # another process removes it
                if directory.stat().st_mtime < time.time() - KEPT_SECONDS:
                    remove_if_possible(directory)

    def make(
        self, build: Callable[[], Iterator[Chunk]], *, answers: bool, say: Callable[[str], None]
    ) -> None:
        """One process. Writes the examples that `build` makes, unless they are there and whole.

        Where another process is writing them, waits for it. `answers`: with references and
        contexts. Raises InputError when the directory cannot be written.
        """
        waited = False
        while True:
            try:
                if self.is_whole(say):
                    return
                with own(self.directory):
                    if not self.is_whole(say):
                        self.remove_unused()
                        self._write(build(), answers)
            except InUse as error:
                if not waited:
                    say(f"waiting for the tokenized data of another run ({error})")
                waited = True
                time.sleep(ANOTHER_LOOK_SECONDS)
            except OSError as error:
                raise InputError(
                    f"cache_dir: {self.directory} cannot be written: {error.strerror or error}; "
                    "set cache_dir (SSM_TRAIN_CACHE) to another directory"
                ) from None

    def is_whole(self, say: Callable[[str], None]) -> bool:
        """Whether every byte is as it was written; says what is wrong where it is not."""
        if not self.directory.exists():
            return False
        with suppress(OSError):  # another user's
            os.utime(self.directory)
        try:
            manifest = json.loads((self.directory / MANIFEST).read_text(encoding="utf-8"))
            found = digest(self.directory / EXAMPLES)
            if found == manifest["sha256"]:
                return True
            reason = f"{EXAMPLES} has another SHA-256 than its manifest says"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        say(f"warning: tokenized data in {self.directory} is damaged ({reason}); making it again")
        return False

    def read(self) -> list[Chunk]:
        """The examples, mapped: bytes are read when they are used, and shared by all processes."""
        try:
            file = pa.ipc.open_file(pa.memory_map(str(self.directory / EXAMPLES)))
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"cache_dir: {self.directory} cannot be read by this process ({error}); set "
                "cache_dir (SSM_TRAIN_CACHE) to a directory that all machines share"
            ) from None
        numbers = range(file.num_record_batches)
        return [read_chunk(*file.get_batch_with_custom_metadata(i)) for i in numbers]

    def _write(self, chunks: Iterator[Chunk], answers: bool) -> None:
        schema = pa.schema(TOKENS | (ANSWERS if answers else {}))
        examples = tokens = 0
        with replace_directory(self.directory) as directory:
            path = directory / EXAMPLES
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
                for chunk in chunks:
                    left_out = {name: str(getattr(chunk, name)) for name in LEFT_OUT}
                    file.write_batch(write_chunk(chunk, schema), left_out)
                    examples += len(chunk)
                    tokens += len(chunk.ids)
            manifest = {
                "sha256": digest(path),
                "size": path.stat().st_size,
                "examples": examples,
                "tokens": tokens,
                "made_from": self.made_from,
            }
            (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def write_chunk(chunk: Chunk, schema: pa.Schema) -> pa.RecordBatch:
    offsets = pa.array(chunk.offsets, pa.int32())
    columns: list[pa.Array] = [
        pa.ListArray.from_arrays(offsets, pa.array(chunk.ids)),
        pa.ListArray.from_arrays(offsets, pa.array(chunk.learnt.view(np.uint8))),
        pa.array(chunk.prompt_lengths),
    ]
    if "references" in schema.names:
        columns += [
            pa.array([list(texts) for texts in chunk.references], ANSWERS["references"]),
            pa.array(chunk.contexts, ANSWERS["context"]),
        ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def read_chunk(batch: pa.RecordBatch, metadata: pa.KeyValueMetadata) -> Chunk:
    """A chunk over the batch's own memory."""
    ids, learnt = batch.column("ids"), batch.column("learnt")
    answers = "references" in batch.schema.names
    return Chunk(
        ids=ids.values.to_numpy(),
        learnt=learnt.values.to_numpy().view(np.bool_),
        lengths=np.diff(ids.offsets.to_numpy()).astype(np.int64),
        prompt_lengths=batch.column("prompt_length").to_numpy(),
        references=tuple(map(tuple, batch.column("references").to_pylist())) if answers else (),
        contexts=tuple(batch.column("context").to_pylist()) if answers else (),
        dropped=int(metadata["dropped"]),
        blank=int(metadata["blank"]),
        first_blank=metadata["first_blank"].decode(),
    )


def default_cache_dir() -> Path:
    """`ssm_train` in the user's cache directory (XDG_CACHE_HOME, else ~/.cache)."""
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "cache_dir") / "ssm_train"


def describe_files(files: tuple[Path, ...]) -> list[list[str]]:
    """Place and SHA-256 of each file: the same files elsewhere are the same data.

    Raises InputError for one that cannot be read.
    """
    folder = os.path.commonpath([file.parent for file in files])
    try:
        return [[os.path.relpath(file, folder), digest(file)] for file in files]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None


def describe_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of all that decides which ids a text gets."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        rules = backend.to_str()
        rules = rules[rules.index('"added_tokens"') :]  # before: how the last call cut and padded
    else:
        described = [tokenizer.get_vocab(), tokenizer.init_kwargs]
        rules = json.dumps(described, sort_keys=True, default=str)
    parts = [type(tokenizer).__name__, rules, str(tokenizer.special_tokens_map)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def describe_code() -> list[str]:
    """SHA-256 of this room's source, and versions of the libraries that make ids: what other code
    would make otherwise is made again."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    ours = hashlib.sha256(b"\n".join(file.read_bytes() for file in files)).hexdigest()
    return [ours, *(f"{name} {metadata.version(name)}" for name in ("tokenizers", "transformers"))]
