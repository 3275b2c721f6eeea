"""A signal to one of two ranks: both save the same step and exit with 75; a second one ends at
once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from starts import start_two
from tiny_runs import LORA, assert_same_run, metrics, write_config

from ssm_train.checkpoint import latest_checkpoint, load_checkpoint

SIGNALLED = Path(__file__).with_name("signalled_run.py")
SAVED, INTERRUPTED = 75, 130


def write(directory: Path, name: str, beside: bool = False) -> Path:
    return write_config(directory, name, "mamba", peft=LORA, batch_size=2, async_save=beside)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signals")


@pytest.fixture(scope="module")
def whole(directory: Path) -> Path:
    ended = start_two("-m", "ssm_train.train", "--cfg", write(directory, "whole"))
    assert [code for code, _ in ended] == [0, 0], ended
    return directory / "output" / "train_seed42" / "whole"


@pytest.mark.parametrize(
    ("number", "rank", "beside"),
    [
        ("SIGTERM", 1, False),
        ("SIGUSR1", 1, True),
        ("SIGINT", 1, False),
        ("SIGINT", 0, False),
    ],
)
def test_one_rank_s_signal_stops_both(
    number: str,
    rank: int,
    beside: bool,
    directory: Path,
    whole: Path,
    survived: Callable[..., None],
) -> None:
    config = write(directory, f"{number}_{rank}", beside)
    ended = start_two(SIGNALLED, rank, 4, number, "train", "--cfg", config)
    assert [code for code, _ in ended] == [SAVED, SAVED], ended
    run_dir = whole.with_name(config.stem)
    path, skipped = latest_checkpoint(run_dir)
    assert path is not None and not skipped
    point = load_checkpoint(path, rank=1)
    assert point.step in (5, 6) and point.world_size == 2 and point.rng is not None
    ended = start_two("-m", "ssm_train.train", "--cfg", config, "--resume")
    assert [code for code, _ in ended] == [0, 0], ended
    # Both ranks' dropout and data went on from the same step.
    assert_same_run(run_dir, whole, unlike={"python"})
    survived("a signal to one of two ranks")


def test_one_rank_s_signal_in_an_evaluation_stops_both(
    directory: Path, whole: Path, survived: Callable[..., None]
) -> None:
    """Of step 4, which has a batch more on rank 0 than on rank 1; the resumed run takes it."""
    config = write(directory, "evaluation")
    ended = start_two(SIGNALLED, 0, "eval-1", "SIGTERM", "train", "--cfg", config)
    assert [code for code, _ in ended] == [SAVED, SAVED], ended
    run_dir = whole.with_name(config.stem)
    path, _ = latest_checkpoint(run_dir)
    assert path is not None and path.name == "step-00000004"
    assert metrics(run_dir, "val") == [] != metrics(whole, "val")
    ended = start_two("-m", "ssm_train.train", "--cfg", config, "--resume")
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same_run(run_dir, whole, unlike={"python"})
    survived("a signal to one of two ranks")


@pytest.mark.parametrize("numbers", ["SIGINT+SIGINT", "SIGTERM+SIGTERM"])
def test_a_second_signal_ends_at_once(numbers: str, directory: Path, whole: Path) -> None:
    config = write(directory, numbers.replace("+", "_"))
    ended = start_two(SIGNALLED, 1, 4, numbers, "train", "--cfg", config)
    (other, _), (code, error) = ended
    assert code == INTERRUPTED and "interrupted" in error
    assert other not in (0, SAVED), ended  # it lost the process that it waits for
    path, skipped = latest_checkpoint(whole.with_name(config.stem))
    assert path is not None and path.name == "step-00000004" and not skipped
