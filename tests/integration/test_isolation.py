"""The preflight of packed runs passes on every family, and stops each kind of leak."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import LORA, train, write_config

from ssm_train.adapters import gla_mixer, mamba_mixer, modules
from ssm_train.errors import InputError
from ssm_train.health.preflight import compiled_length
from ssm_train.kernels import causal_conv1d, selective_scan, ssd
from ssm_train.kernels.gla import gla as gla_kernel

PACKED = {"packing": True, "batch_size": None, "tokens_per_batch": 128, "max_steps": 1}
INITIAL_STATE = {"peft_type": "SSMPEFT", "scan": {"type": "init_state", "init": "zero"}}


def write(directory: Path, family: str, **changes: Any) -> Path:
    return write_config(directory, "packed", family, **PACKED | changes)


@pytest.mark.parametrize("prec", ["fp32", "bf16"])
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize("family", ["gla", "mamba", "mamba2"])
def test_packed_runs_start(family: str, peft: Any, prec: str, tmp_path: Path) -> None:
    assert train(write(tmp_path, family, peft=peft, prec=prec)).outcome == "finished"


def test_documents_start_from_a_trained_state(tmp_path: Path) -> None:
    result = train(write(tmp_path, "mamba", peft=INITIAL_STATE))
    assert result.outcome == "finished"


def without_documents(op: Any, *args: Any, cu_seqlens: Any = None, **options: Any) -> Any:
    """A kernel that takes a packed row for one document."""
    return op(*args, **options)


def with_other_starts(op: Any, *args: Any, initial_state: Any = None, **options: Any) -> Any:
    """A kernel that knows documents, and starts those of a packed row from a state of its own."""
    if options.get("cu_seqlens") is not None:
        A = args[2]
        initial_state = A.new_full((1, *A.shape), 0.5)
    return op(*args, initial_state=initial_state, **options)


@pytest.mark.parametrize("prec", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "place", "name", "op"),
    [
        ("gla", gla_mixer, "gla", gla_kernel),
        ("mamba", mamba_mixer, "selective_scan", selective_scan.selective_scan),
        ("mamba", modules, "causal_conv1d", causal_conv1d.causal_conv1d),
        ("mamba2", mamba_mixer, "ssd", ssd.ssd),
        ("mamba2", modules, "causal_conv1d", causal_conv1d.causal_conv1d),
    ],
)
def test_a_kernel_that_sees_no_documents_stops_the_run(
    family: str, place: Any, name: str, op: Any, prec: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(place, name, partial(without_documents, op))
    config = write(tmp_path, family, peft=LORA, prec=prec)
    with pytest.raises(InputError, match=r"packing: documents of one row are not apart.*report"):
        train(config)
    assert not (tmp_path / "output").exists()
    unchecked = write(tmp_path, family, peft=LORA, prec=prec, packing_check=False)
    assert train(unchecked).outcome == "finished"


def test_documents_that_start_elsewhere_than_alone_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = partial(with_other_starts, selective_scan.selective_scan)
    monkeypatch.setattr(mamba_mixer, "selective_scan", scan)
    with pytest.raises(InputError, match="second document of a row has other logits than alone"):
        train(write(tmp_path, "mamba", peft=LORA))


def test_graphs_that_cannot_be_stop_the_run_before_it_writes(tmp_path: Path) -> None:
    config = write(tmp_path, "gla", cuda_graphs=True)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="cuda_graphs: true cannot be, because the device is cpu"):
        train(config)
    assert not [path for path in set(tmp_path.rglob("*")) - before if path.name == "cfg.yaml"]


@pytest.mark.parametrize(
    ("tokens", "row", "length"),
    [(100, 16_384, 4096), (100, 512, 512), (6001, 16_384, 6016), (1000, 512, 1008)],
)
def test_rows_of_the_check_on_a_gpu(tokens: int, row: int, length: int) -> None:
    """Two documents may be longer together than a row of the run."""
    assert compiled_length(tokens, row) == length >= tokens
