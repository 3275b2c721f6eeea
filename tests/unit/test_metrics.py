"""The metrics log, the rate, the progress lines, the plot, the trackers."""

import json
import math
from pathlib import Path

import pytest

from ssm_train.errors import InputError
from ssm_train.metrics import (
    MetricsLog,
    Progress,
    TokenRate,
    clock,
    peak_memory_gib,
    read_metrics,
    short_number,
)
from ssm_train.plot import plot_metrics

ROW = {
    "step": 10,
    "loss": 1.5,
    "learning_rate": 5e-4,
    "tokens_per_second": 12_345.6,
    "memory_gib": 0.5,
    "seconds": 20.0,
}


def write_steps(path: Path, steps: range) -> None:
    with MetricsLog(path) as log:
        for step in steps:
            log.write("train", {"step": step, "loss": 1 / step})


def test_rows_are_on_disk_at_once_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("train", {"step": 1, "loss": 0.1})
    log.write("val", {"step": 1, "accuracy": math.nan, "loss": math.inf})
    assert read_metrics(path) == [
        {"split": "train", "step": 1, "loss": 0.1},
        {"split": "val", "step": 1, "accuracy": None, "loss": None},
    ]
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    log.close()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    with path.open("a") as file:
        file.write('{"split": "train", "st')  # killed in the middle of a line
    with MetricsLog(path, resume_step=5) as log:
        log.write("train", {"step": 6, "loss": 9.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(path)[-1]["loss"] == 9.0


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    MetricsLog(path).close()
    assert read_metrics(path) == []


def test_a_damaged_log_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_the_rate_counts_new_tokens_only() -> None:
    rate = TokenRate(tokens=1_000)  # resumed
    assert rate.read(tokens=1_500, seconds=2.0) == 250.0
    assert rate.read(tokens=4_500, seconds=1.0) == 3_000.0
    assert rate.read(tokens=4_500, seconds=0.0) == 0.0


def test_memory_is_of_this_process() -> None:
    assert 0.01 < peak_memory_gib() < 1_000


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (64.6, "1:05"), (3_599.7, "1:00:00"), (3_845, "1:04:05")]
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (812.4, "812"), (12_345, "12.3k"), (4.56e6, "4.56M")]
)
def test_short_number(value: float, shown: str) -> None:
    assert short_number(value) == shown


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total_steps=100) as progress:
        progress.update(ROW)
        progress.say("step 10: accuracy [0.5]")
    assert capsys.readouterr().out.splitlines() == [
        "step 10/100  loss 1.5000  lr 5.0e-04  12.3k tokens/s  0.5 GiB  3:00 left",
        "step 10: accuracy [0.5]",
    ]


def test_time_left_after_a_resume(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total_steps=100, step=90) as progress:
        progress.update({**ROW, "step": 95, "seconds": 10.0})
    assert "0:10 left" in capsys.readouterr().out


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total_steps=100, main=False) as progress:
        progress.update(ROW)
        progress.say("text")
    assert capsys.readouterr().out == ""


def test_plot_shows_losses_and_metrics_of_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with MetricsLog(tmp_path / name / "metrics.jsonl") as log:
            for step in (1, 2, 3):
                log.write("train", {"step": step, "loss": 1 / step, "tokens_per_second": 5.0})
            log.write("val", {"step": 3, "loss": 0.5, "perplexity": 1.6, "accuracy": 0.75})
            log.write("val", {"step": 4, "loss": math.nan, "accuracy": 1.0})
    png = plot_metrics([tmp_path / "first", tmp_path / "second"], tmp_path / "out" / "m.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    losses, accuracy = (axes for axes in figures[0].axes if axes.axison)
    assert losses.get_title() == "Loss"
    assert "nats" in losses.get_ylabel() and losses.get_xlabel() == "optimizer step"
    assert [list(line.get_xdata()) for line in losses.lines] == [[1, 2, 3], [3]] * 2
    assert accuracy.get_title() == "Accuracy"
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[0.75, 1.0]] * 2


def test_plot_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        plot_metrics([tmp_path], tmp_path / "m.png")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no metrics yet"):
        plot_metrics([tmp_path], tmp_path / "m.png")
