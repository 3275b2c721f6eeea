"""Two processes under DDP, ZeRO and FSDP2 train what one process trains: losses, weights, metrics,
generations; and a run that was stopped goes on with one process and with four."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_runs import (
    COMMON,
    COMPARED,
    DEVICE,
    ENGINES,
    FUSED,
    NAMES,
    ODD,
    cases_of,
    copy_run,
    go_on,
    run_all,
    run_directory,
    run_made_again,
    spawn,
    try_cast,
    try_raw_reads,
    try_to_free,
    write,
)
from tiny_runs import assert_same_tensors, exported, losses, metrics, train

STOPPED = [name for name in COMPARED if "stopped" in name]
PAIRS = [
    (engine, name)
    for engine in ENGINES
    for name in cases_of(engine)
    if name in COMPARED and name not in STOPPED
]
NEAR, TENSORS_NEAR = (1e-5, 1e-6) if DEVICE == "cpu" else (1e-4, 1e-4)
MADE = ("Remembered", "_Convolution", "_Norm", "_SwiGlu")  # whose outputs are made again
RESUMING = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one process, without an end before time."""
    directory = tmp_path_factory.mktemp("alone")
    for name in (*COMPARED, *ODD):
        train(write(directory, name, 1))
    return directory


@pytest.fixture(scope="session")
def under(tmp_path_factory: pytest.TempPathFactory):
    """Engine -> the directory with all cases, trained by two processes under it, once."""
    done: dict[str, Path] = {}

    def run(engine: str) -> Path:
        if engine not in done:
            done[engine] = directory = tmp_path_factory.mktemp(engine)
            for name in cases_of(engine):
                write(directory, name, 2)
            spawn(run_all, 2, engine, directory, cases_of(engine))
        return done[engine]

    return run


def results(directory: Path, name: str) -> list[list]:
    return [json.loads((directory / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def assert_same_run(two: Path, one: Path) -> None:
    """Losses, validation, exported weights, generations."""
    assert losses(two) == pytest.approx(losses(one), abs=NEAR)
    full = not (one / "adapter").exists()
    assert_same_tensors(exported(two), exported(one), tolerance=NEAR if full else TENSORS_NEAR)
    validations = metrics(one, "val")
    assert len(validations) == 2
    for ours, expected in zip(metrics(two, "val"), validations, strict=True):
        assert ours.pop("split") == expected.pop("split")
        assert ours == pytest.approx(expected, abs=NEAR, rel=NEAR)
    tokens = [row["tokens"] for row in metrics(one, "train")]
    assert [row["tokens"] for row in metrics(two, "train")] == tokens
    for file in one.glob("predictions-*.jsonl"):
        assert (two / file.name).read_text() == file.read_text()


@pytest.mark.parametrize(("engine", "name"), PAIRS)
def test_it_trains_what_one_process_trains(engine: str, name: str, alone: Path, under) -> None:
    directory = under(engine)
    assert_same_run(run_directory(directory, name), run_directory(alone, name))
    first, second = results(directory, name)
    assert first == second and first[:2] == ["finished", 20]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["gla_bf16", "mamba_bf16"])
def test_a_bf16_base_under_fp32_adapters(engine: str, name: str, alone: Path, under) -> None:
    """The mixers themselves check that step sizes and decays are fp32, after the engine's work."""
    one, two = run_directory(alone, name), run_directory(under(engine), name)
    assert losses(two) == pytest.approx(losses(one), abs=2e-2)
    assert {str(t.dtype) for t in exported(two).values()} == {"torch.float32"}
    assert losses(two)[-1] < losses(two)[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_computes_in_the_run_s_precision_and_by_our_operations(engine, under) -> None:
    for rank in results(under(engine), "gla_bf16"):
        assert rank[-1] == [*FUSED, "torch.bfloat16"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_with_an_infinite_loss_on_one_rank_is_skipped_by_all(
    engine: str, alone: Path, under
) -> None:
    directory = under(engine)
    assert results(directory, "mamba_inf")[0][:2] == ["finished", 6]
    rows = metrics(run_directory(directory, "mamba_inf"), "train")
    skipped = [row["skipped_steps"] for row in rows]
    assert skipped == [0, 0, 1, 1, 1, 1]
    before = losses(run_directory(alone, "mamba_inf"))
    found = [row["loss"] for row in rows]
    assert found[:2] == pytest.approx(before[:2], abs=NEAR)
    assert all(loss == loss for loss in found[3:])  # the weights are numbers


@pytest.mark.parametrize("engine", RESUMING)
def test_it_goes_on_with_one_process_and_with_four(engine: str, alone: Path, under) -> None:
    directory = under(engine)
    for name in STOPPED:
        assert results(directory, name)[0][0] == "stopped"
    others = (1, 4) if DEVICE == "cpu" else (1,)
    if 4 in others:
        spawn(go_on, 4, engine, [copy_run(directory, name, 4) for name in STOPPED])
    for name in STOPPED:
        train(copy_run(directory, name, 1), resume=True)
        for processes in others:
            again = run_directory(directory, f"{name}_{processes}")
            assert_same_run(again, run_directory(alone, name))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the cases run by the reference")
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_what_is_made_again_reads_whole_weights(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a norm or a convolution, in the backward pass of the layer that reads its output."""
    names = ["gla_packed", "mamba_packed_full"]
    for name, value in (("max_steps", 2), ("eval_steps", 2), ("save_steps", 2)):
        monkeypatch.setitem(COMMON, name, value)
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
    for name in names:
        train(write(one, name, 1))
        write(two, name, 2)
    spawn(run_made_again, 2, engine, two, names)
    for name in names:
        found, expected = (losses(run_directory(d, name)) for d in (two, one))
        assert found == pytest.approx(expected, abs=NEAR)
    for rank in (0, 1):
        made = json.loads((two / f"made-{rank}.json").read_text())
        assert made == [f"{name}Backward" for name in MADE]


def test_a_raw_read_of_a_partitioned_weight_stops_the_run(tmp_path: Path) -> None:
    """Its part on a process is no weight: empty, or flat."""
    spawn(try_raw_reads, 2, "zero3", write(tmp_path, "gla_full", 2))
    for rank in (0, 1):
        assert "Error" in (tmp_path / f"raw-{rank}.txt").read_text()


def test_a_stage_leaves_nothing_of_its_engine(tmp_path: Path) -> None:
    """DeepSpeed's globals keep modules of ZeRO-3 and whatever those lead to."""
    spawn(try_to_free, 2, "zero3", write(tmp_path, "mamba_sparse", 2))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"left-{rank}.json").read_text()) == [0]


@pytest.mark.parametrize(("name", "tensor"), [("gla_lora", "gk_proj.1.bias"), ("mamba_lora", "A_")])
def test_an_engine_that_casts_stops_the_run(name: str, tensor: str, tmp_path: Path) -> None:
    spawn(try_cast, 2, "ddp", write(tmp_path, name, 2))
    for rank in (0, 1):
        said = (tmp_path / f"cast-{rank}.txt").read_text()
        assert tensor in said and "not fp32" in said, said


@pytest.mark.parametrize("engine", ENGINES)
def test_the_record_names_the_engine(engine: str, under) -> None:
    file = run_directory(under(engine), "gla_bf16") / "environment.json"
    environment = json.loads(file.read_text())
    assert environment["engine"] == NAMES[engine] and environment["processes"] == 2
