"""Whole runs, killed in a save and started again with --resume: losses and weights are those of a
run that was not killed, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import FIRST, Point, fork_ranks, kill_in_save, points_of
from starts import start
from tiny_runs import LORA, SPARSE, assert_same_run, metrics, train, write_config

from ssm_train.cli import main

KILLED_RUN = Path(__file__).with_name("killed_run.py")
KILLED, ENDED_BY_TORCHRUN = -9, 1

SECOND_SAVE: list[Point] = [
    (FIRST, 1),
    ("leftovers removed", 1),
    ("directory made", 1),
    ("rng-00000.json written", 1),
    ("rng-00000.json synced", 1),
    ("trainable.safetensors written", 1),
    ("trainable.safetensors synced", 1),
    ("optimizer.safetensors written", 1),
    ("optimizer.safetensors synced", 1),
    ("state.json written", 1),
    ("state.json synced", 1),
    ("manifest.json written", 1),
    ("manifest.json synced", 1),
    ("directory synced", 1),
    ("renamed", 1),
    ("rename synced", 1),
    ("last written", 1),
    ("last synced", 1),
    ("last renamed", 1),
    ("last rename synced", 1),
    ("best written", 1),
    ("best synced", 1),
    ("best renamed", 1),
    ("best rename synced", 1),
    ("pruned one renamed", 1),
    ("pruned one removed", 1),
]
"""Of every run below, in its second save and in the fourth."""
OF_RANK_1: list[Point] = [("rng-00001.json written", 1), ("rng-00001.json synced", 1)]
ALWAYS = ("optimizer.safetensors written", "renamed", "pruned one renamed")

# case -> family, PEFT settings, processes, the save in which it is killed
RUNS: dict[str, tuple[str, Any, int, int]] = {
    "lora": ("gla", LORA, 1, 2),
    "full": ("mamba", None, 1, 2),
    "sd_lora_warmup": ("mamba", SPARSE, 1, 2),
    "sd_lora": ("mamba", SPARSE, 1, 4),
    "lora, two processes": ("gla", LORA, 2, 2),
    "full, two processes": ("mamba", None, 2, 2),
    "sd_lora_warmup, two processes": ("mamba", SPARSE, 2, 2),
    "sd_lora, two processes": ("mamba", SPARSE, 2, 4),
}
BRIEF = ("lora", "full", "sd_lora_warmup", "sd_lora", "lora, two processes")
"""Of these some points are tried in `make test-faults`."""


def points_of_case(case: str) -> list[Point]:
    return SECOND_SAVE + (OF_RANK_1 if RUNS[case][2] > 1 else [])


def write(directory: Path, case: str, name: str) -> Path:
    family, peft, processes, _ = RUNS[case]
    return write_config(
        directory, name, family, peft=peft, save_total_limit=1, batch_size=4 // processes
    )


Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(directory: Path) -> Whole:
    """The run directory of a case that nothing killed."""

    def of(case: str) -> Path:
        name = "whole_" + case.replace("_warmup", "").replace(", ", "_").replace(" ", "_")
        run_dir = directory / "output" / "train_seed42" / name
        if not run_dir.exists():
            config = write(directory, case, name)
            done = start(RUNS[case][2], "-m", "ssm_train.train", "--cfg", config)
            assert done.returncode == 0, done.stderr
        return run_dir

    return of


def every_case() -> list[Any]:
    return [
        pytest.param(
            case,
            point,
            id=f"{case}: {point[0]}",
            marks=[] if case in BRIEF and point[0] in ALWAYS else [pytest.mark.every_point],
        )
        for case in RUNS
        for point in points_of_case(case)
    ]


@pytest.mark.parametrize(("case", "point"), every_case())
def test_a_killed_run_goes_on(
    case: str, point: Point, directory: Path, whole: Whole, survived: Callable[..., None]
) -> None:
    kill_and_go_on(case, RUNS[case][3], point, directory, whole)
    survived(f"kills of a run, {case}")


def test_killed_between_the_stages(directory: Path, whole: Whole) -> None:
    """In the first save of the second stage, which has no checkpoint yet."""
    kill_and_go_on("sd_lora", 3, ("manifest.json synced", 1), directory, whole)


def kill_and_go_on(case: str, save: int, point: Point, directory: Path, whole: Whole) -> None:
    processes = RUNS[case][2]
    name = f"{case}_{save}_{point[0]}".replace(" ", "_").replace(",", "")
    config = write(directory, case, name)
    in_processes = start_anew if case in BRIEF and point[0] in ALWAYS else start_forked
    in_processes(config, processes, save, point)
    expected = whole(case)
    actual = expected.with_name(config.stem)
    # A module imported for the first time may draw from Python's own generator; training does not.
    assert_same_run(actual, expected, unlike={"python"})
    if (expected / "warmup").exists():
        assert metrics(actual / "warmup") == metrics(expected / "warmup")


def start_forked(config: Path, processes: int, save: int, point: Point) -> None:
    """Children of this process spare the seconds in which a new one loads its libraries."""
    command = ["train", "--cfg", str(config)]
    torch.set_num_threads(1)
    killed = fork_ranks(processes, partial(main, command), kill_in_save(save, point))
    assert killed[0] == KILLED and 0 not in killed, killed  # rank 0 writes
    again = fork_ranks(processes, partial(main, [*command, "--resume"]))
    assert again == [0] * processes


def start_anew(config: Path, processes: int, save: int, point: Point) -> None:
    killed = start(processes, KILLED_RUN, save, *point, "train", "--cfg", config)
    assert killed.returncode == (KILLED if processes == 1 else ENDED_BY_TORCHRUN), killed.stderr
    if processes > 1:
        assert "Signal 9 (SIGKILL) received by PID" in killed.stderr
    again = start(processes, "-m", "ssm_train.train", "--cfg", config, "--resume")
    assert again.returncode == 0, again.stderr
    assert "resuming from step-" in again.stdout


@pytest.mark.parametrize("case", ["lora", "sd_lora"])
def test_the_points_are_all_there_are(case: str, directory: Path) -> None:
    """In order; a second stage keeps its choice as well."""
    config = write(directory, case, f"points_{case}")
    points = points_of(lambda: train(config))
    starts = [i for i, point in enumerate(points) if point[0] == FIRST]
    begin = starts[RUNS[case][3] - 1]
    names = [name for name, _ in points[begin : starts[RUNS[case][3]]]]
    names = [name for name in names if not name.startswith(("predictions", "base."))]
    assert names == [name for name, _ in SECOND_SAVE]
