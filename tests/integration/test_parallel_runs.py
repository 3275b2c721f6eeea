"""Two processes (gloo) train what one process trains, when the global batch is the same."""

import json
import os
import socket
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    LORA,
    LORA_GA,
    PISSA,
    SIDES,
    SPARSE,
    assert_same_tensors,
    exported,
    losses,
    metrics,
    stop_in_step,
    train,
    write_config,
)

from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT

CALM = LORA | {"lora_dropout": 0.0}  # dropout differs between ranks by design
# name -> family, changes of both runs; 4 examples a step: one process 4 x 1, two processes 2 x 1,
# or 1 x 2 with accumulation.
RUNS = {
    "gla": ("gla", {"peft": CALM, "eval_gen": {"max_new_tokens": 8}}),
    "accumulated": ("mamba", {"peft": CALM, "task": SIDES, "lock": True}),
    "pissa": ("mamba", {"peft": PISSA}),
    "lora_ga": ("mamba", {"peft": LORA_GA}),
    "sd_lora": ("mamba", {"peft": SPARSE}),
    "packed": ("gla", {"peft": CALM, "packing": True, "tokens_per_batch": 48, "batch_size": None}),
    "base": ("mamba", {"peft": CALM}),
    "resumed": ("mamba", {"peft": CALM}),
}


def cut(name: str, processes: int) -> dict[str, int]:
    """How a step's examples are cut into micro-batches."""
    if name == "packed":
        return {"gradient_accumulation_steps": 2 // processes}
    if name == "accumulated" and processes == 2:
        return {"batch_size": 1, "gradient_accumulation_steps": 2}
    return {"batch_size": 4 // processes}


def write(directory: Path, name: str, processes: int) -> Path:
    family, changes = RUNS[name]
    if name == "base":
        base = write_config(
            directory, "new", family, max_steps=3, skip_eval=True, **cut(name, processes)
        )
        changes = changes | {"new_model": None, "tokenizer": None, "model": str(base)}
    return write_config(directory, name, family, **changes | cut(name, processes))


class Patch:
    setattr = staticmethod(setattr)


def two_process_worker(rank: int, port: int, directory: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        report_bad_input(rank, Path(directory))
        for name in RUNS:
            if name == "resumed" and rank == 1:  # one rank's signal stops both
                stop_in_step(Patch, 3)
            result = train(Path(directory) / f"{name}.yaml")
            Path(directory, f"{name}-{rank}.json").write_text(
                json.dumps([result.outcome, result.steps, result.after])
            )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def report_bad_input(rank: int, directory: Path) -> None:
    out, error = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        code = main(["train", "--cfg", str(directory / "bad.yaml")])
    result = [code, out.getvalue(), error.getvalue()]
    (directory / f"bad-{rank}.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """(runs of one process, runs of two processes)."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for name in RUNS:
        write(two, name, 2)
        train(write(one, name, 1))
    write_config(two, "bad", "mamba", peft=LORA | {"target_modules": ["q_proj"]})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(two_process_worker, (port, str(two)), nprocs=2)
    return one, two


def run_directory(directory: Path, name: str) -> Path:
    return directory / "output" / "train_seed42" / name


@pytest.mark.parametrize("name", [name for name in RUNS if name != "resumed"])
def test_two_processes_train_what_one_does(name, directories):
    one, two = (run_directory(directory, name) for directory in directories)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert_same_tensors(exported(two), exported(one), tolerance=1e-6)
    for ours, expected in zip(metrics(two, "val"), metrics(one, "val"), strict=True):
        assert ours == pytest.approx(expected, abs=1e-5)
    if name == "sd_lora":
        assert losses(two / "warmup") == pytest.approx(losses(one / "warmup"), abs=1e-5)
        choices = [json.loads((run / "selection.json").read_text()) for run in (one, two)]
        assert choices[0] == choices[1]
    tokens = [row["tokens"] for row in metrics(one, "train")]
    assert [row["tokens"] for row in metrics(two, "train")] == tokens
    for file in one.glob("predictions-*.jsonl"):
        assert (two / file.name).read_text() == file.read_text()
    results = [json.loads((directories[1] / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]


def test_predictions_were_compared(directories):
    for name in ("gla", "accumulated"):
        (file, *_) = sorted(run_directory(directories[1], name).glob("predictions-*.jsonl"))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [row["example"] for row in rows] == list(range(9))


def test_a_run_of_two_processes_goes_on_with_one(directories):
    one, two = (run_directory(directory, "resumed") for directory in directories)
    stopped = [json.loads((directories[1] / f"resumed-{rank}.json").read_text()) for rank in (0, 1)]
    assert stopped[0] == stopped[1] and stopped[0][0] == "stopped" and 3 < stopped[0][1] < 8
    result = train(directories[1] / "resumed.yaml", resume=True)  # batch_size 2: accumulates twice
    assert result.outcome == "finished"
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert_same_tensors(exported(two), exported(one), tolerance=1e-6)


def test_bad_input_is_one_line_a_rank(directories):
    for rank in (0, 1):
        code, out, error = json.loads((directories[1] / f"bad-{rank}.json").read_text())
        assert (code, out) == (BAD_INPUT, "")
        assert error.count("\n") == 1 and "matches no module" in error
        assert error.startswith("error (rank 1): " if rank else "error: ")
    assert not run_directory(directories[1], "bad").exists()
