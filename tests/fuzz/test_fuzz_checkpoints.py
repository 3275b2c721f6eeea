"""Checkpoint directories: whatever their files hold, a checkpoint is found whole, or skipped with a
line, or refused with an InputError; nothing outside is read as one, or removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from made_inputs import attempt, damaged, examples, misspelt, temporary_directory, values

from ssm_train import checkpoint, snapshot
from ssm_train.checkpoint import (
    MANIFEST,
    digest,
    latest_checkpoint,
    load_checkpoint,
    own_digest,
    prune,
)
from ssm_train.finished import find_checkpoint
from ssm_train.resume import find_resume_point

ROOT = temporary_directory()
RUN, WHOLE = ROOT / "run", ROOT / "whole"
STATE = {
    "train": {"step": 7, "tokens": 10},
    "stage": "train",
    "global_batch": 4,
    "scaler": None,
}


def write_run() -> Path:
    """A run directory with one whole checkpoint; the same one each time."""
    shutil.rmtree(RUN, ignore_errors=True)
    shutil.copytree(WHOLE, RUN)
    return RUN / "checkpoints" / "step-00000007"


checkpoint.save_checkpoint(
    WHOLE,
    7,
    {"trainable": {"w": torch.ones(2)}, "optimizer": {"w.exp_avg": torch.ones(2)}},
    STATE,
    [snapshot.collect_rng()],
)
(ROOT / "outside.json").write_text("{}")
write_run()
MANIFEST_OF_IT = json.loads((RUN / "checkpoints/step-00000007" / MANIFEST).read_text())
FILES = sorted(MANIFEST_OF_IT["files"])
file_entries = st.one_of(
    values, st.fixed_dictionaries({"size": st.one_of(st.just(2), values), "sha256": values})
)
names = st.one_of(
    st.sampled_from([*FILES, "../../../outside.json", "/etc/passwd", ".", "..", MANIFEST]),
    values.map(str),
)
manifests = st.builds(
    lambda changes, files, sign: {
        **MANIFEST_OF_IT, "files": files or MANIFEST_OF_IT["files"], **changes, "sign": sign
    },
    st.dictionaries(misspelt([*MANIFEST_OF_IT]), values, max_size=2),
    st.one_of(st.none(), st.dictionaries(names, file_entries, max_size=3), values),
    st.booleans(),
)  # fmt: skip


def use() -> None:
    """All that looks at checkpoints."""
    attempt(lambda: latest_checkpoint(RUN))
    attempt(lambda: find_checkpoint(RUN, "last"))
    point = attempt(lambda: find_resume_point(RUN))
    if point is not None and point[0] is not None:
        found = point[0]
        if found.rng is not None:
            rng = found.rng
            attempt(lambda: snapshot.restore_rng(rng))
    attempt(lambda: load_checkpoint(RUN / "checkpoints" / "step-00000007"))
    attempt(lambda: prune(RUN, 1))
    assert (ROOT / "outside.json").exists()


def sign(path: Path) -> None:
    """The manifest again, as if what is there had been written so."""
    (path / MANIFEST).unlink()
    files = {p.name: {"size": p.stat().st_size, "sha256": digest(p)} for p in path.iterdir()}
    manifest = {"format": 1, "step": 7, "world_size": 1, "files": files}
    text = json.dumps({**manifest, "sha256": own_digest(manifest)})
    (path / MANIFEST).write_text(text, encoding="utf-8")


@examples(300)
@given(manifests)
def test_manifest(manifest: dict[str, Any]) -> None:
    path = write_run()
    signed = manifest.pop("sign")
    if signed:
        manifest.pop("sha256", None)
        manifest["sha256"] = own_digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    use()


@examples(100)
@given(st.sampled_from([*FILES, MANIFEST]), damaged(st.just("")), st.booleans(), st.floats(0, 1))
def test_damaged_file(name: str, noise: bytes, again: bool, place: float) -> None:
    path = write_run()
    content = (path / name).read_bytes()
    at = int(place * len(content))
    (path / name).write_bytes(content[:at] + noise + content[at + len(noise) + 1 :])
    if again and name != MANIFEST:
        sign(path)
    use()


json_files = st.builds(
    lambda original, changes: {**original, **changes},
    st.sampled_from([{**STATE, "step": 7}, snapshot.collect_rng()]),
    st.dictionaries(
        misspelt(["train", "stage", "global_batch", "scaler", "python", "numpy", "torch", "cuda"]),
        st.one_of(values, st.dictionaries(misspelt(["step", "tokens", "best_step"]), values)),
        max_size=2,
    ),
)


@examples(200)
@given(st.one_of(json_files, values))
def test_signed_state(state: Any) -> None:
    path = write_run()
    name = "rng-00000.json" if isinstance(state, dict) and "python" in state else "state.json"
    (path / name).write_text(json.dumps(state), encoding="utf-8")
    sign(path)
    use()


@examples(100)
@given(
    damaged(st.sampled_from(["step-00000007\n", "step-1", "", "x"])),
    st.sampled_from(["last", "best"]),
)
def test_pointer(content: bytes, name: str) -> None:
    write_run()
    (RUN / "checkpoints" / name).write_bytes(content)
    attempt(lambda: checkpoint.read_pointer(RUN, name))
    use()
