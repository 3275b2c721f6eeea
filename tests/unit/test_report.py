"""The report over many runs: order, columns, files, picture; and the result that it reads."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE
from ssm_train.config import RunConfig, dump_yaml, run_directory
from ssm_train.errors import InputError
from ssm_train.metrics import MetricsLog
from ssm_train.record.report import find_runs, report_runs
from ssm_train.record.summary import Result, write_result


def write_run(
    root: Path,
    name: str,
    value: float | None = None,
    *,
    data: str = "cola",
    seed: int = 42,
    metric: str = "accuracy",
    test: float | None = None,
    steps: int = 120,
    **changes: Any,
) -> Path:
    """A run directory as a run of that config leaves it; without `value` it has not ended."""
    cfg = RunConfig(model="a-model", data=data, seed=seed, name=name, output_root=str(root))
    run_dir = run_directory(cfg)
    run_dir.mkdir(parents=True)
    (run_dir / "cfg.yaml").write_text(dump_yaml(cfg), encoding="utf-8")
    with MetricsLog(run_dir / "metrics.jsonl") as log:
        for step in (10, steps):
            log.write("train", {"step": step, "loss": 1.5})
    if value is not None:
        ended: dict[str, Any] = {
            "outcome": "finished",
            "run_dir": run_dir,
            "steps": steps,
            "main_metric": metric,
            "before": {},
            "after": {metric: value, "tokens": 900.0},
            "best_step": 80,
            "trainable": 250,
            "parameters": 10_000,
            "seconds": 3_845.25,
            "test": {} if test is None else {metric: test},
            "rates": [10.0, 12_345.6, 12_345.6],
        }
        write_result(Result(**ended | changes))
    return run_dir


def names(text: str) -> list[str]:
    """First cells of the rows, "" for an empty line."""
    return [line.split("  ")[0] for line in text.splitlines()[2:]]


def cells(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.split("  ")[0] == name]
    return line.split()


def test_a_result_is_written_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "a", 0.1 + 0.2, after={"loss": math.nan, "accuracy": 0.1 + 0.2})
    text = (run_dir / "result.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "outcome": "finished",
        "stage": "train",
        "steps": 120,
        "main_metric": "accuracy",
        "best_step": 80,
        "metrics": {"loss": None, "accuracy": 0.1 + 0.2},
        "before": {},
        "test": {},
        "trainable": 250,
        "parameters": 10_000,
        "skipped_steps": 0,
        "seconds": 3_845.25,
        "tokens_per_second": 12_345.6,
    }
    assert not list(run_dir.glob("*.tmp"))
    stopped = write_run(tmp_path, "b", 0.0, rates=[], best_step=None, seconds=math.inf)
    result = json.loads((stopped / "result.json").read_text(encoding="utf-8"))
    assert result["tokens_per_second"] is result["best_step"] is result["seconds"] is None


def test_rows_are_sorted_by_data_seed_and_metric(tmp_path: Path) -> None:
    for name, value in (("middle", 0.5), ("worst", -0.25), ("best", 0.75)):
        write_run(tmp_path, name, value)
    write_run(tmp_path, "open", steps=70)
    write_run(tmp_path, "unmeasured", math.nan)
    write_run(tmp_path, "late", 0.9, seed=127)
    write_run(tmp_path, "early", 0.1, seed=7)
    for name, value in (("high", 8.0), ("low", 2.0)):
        write_run(tmp_path, name, value, data="data/alpaca.jsonl", metric="loss")
        write_run(tmp_path, f"{name}_p", value, data="data/alpaca.jsonl", metric="perplexity")
    (tmp_path / "cola_seed42" / "begun").mkdir()
    cfg = RunConfig(model="a-model", data="cola", name="begun")
    (tmp_path / "cola_seed42" / "begun" / "cfg.yaml").write_text(dump_yaml(cfg))
    assert names(report_runs(find_runs([tmp_path]))) == [
        *("low", "high", "low_p", "high_p", ""),
        *("early", ""),
        *("best", "middle", "worst", "unmeasured", "begun", "open", ""),
        "late",
    ]


def test_what_a_row_says(tmp_path: Path) -> None:
    write_run(tmp_path, "done", 0.87654321, test=0.5)
    write_run(tmp_path, "ended", 0.25, outcome="low_metric")
    write_run(tmp_path, "open", steps=70)
    text = report_runs(find_runs([tmp_path]))
    header = "name data seed metric best step test trainable time tokens/s outcome"
    assert " ".join(cells(text, "name")) == header
    expected = "done cola 42 accuracy 0.8765 80 0.5000 2.50% 1:04:05 12.3k finished"
    assert " ".join(cells(text, "done")) == expected
    assert cells(text, "ended")[4:7] == ["0.2500", "80", "-"]
    assert text.splitlines()[3].endswith("  low_metric (step 120)")
    assert cells(text, "open")[3:10] == ["-"] * 7
    assert text.splitlines()[4].endswith("  running or stopped early (step 70)")


def test_text_is_aligned_plain_and_of_bounded_width(tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b" * 128, "E1_QKVO_plus_G_plus_GK_plus_MLP_r8_alpha16")):
        write_run(tmp_path, name, 10.0**i, data="d" * 60, metric="a_metric_of_a_very_long_name")
    write_run(tmp_path, "open", data="d" * 60)
    text = report_runs(find_runs([tmp_path]))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 200
    assert text.replace("\n", "").isprintable()
    bounds = [i for i, mark in enumerate(lines[1]) if mark == " " and lines[1][i - 1] == "-"]
    assert len(bounds) == 10
    for line in (lines[0], *lines[2:]):
        assert all(line[i : i + 2].strip() == "" for i in bounds), line
    assert "E1_QKVO_plus_G_plus_GK_plus_MLP_r8_alpha16" in text
    assert any(line.startswith("bbb") and "…" in line for line in lines)


def test_csv_has_full_precision(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "runs", "done", 0.1 + 0.2, test=1 / 3)
    write_run(tmp_path / "runs", "open", steps=70)
    report_runs(find_runs([tmp_path / "runs"]), tmp_path / "new" / "wd0.01")
    with (tmp_path / "new" / "wd0.01.csv").open(encoding="utf-8", newline="") as file:
        done, still_open = csv.DictReader(file)
    assert done == {
        "run_dir": str(run_dir),
        "name": "done",
        "data": "cola",
        "seed": "42",
        "outcome": "finished",
        "steps": "120",
        "main_metric": "accuracy",
        "best": "0.30000000000000004",
        "best_step": "80",
        "test": "0.3333333333333333",
        "trainable": "250",
        "parameters": "10000",
        "seconds": "3845.25",
        "tokens_per_second": "12345.6",
    }
    assert (still_open["outcome"], still_open["steps"]) == ("running or stopped early", "70")
    assert {still_open[key] for key in ("best", "test", "seconds", "main_metric")} == {""}


def test_the_picture_has_a_panel_for_each_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    write_run(tmp_path, "good", 0.75, test=0.5)
    write_run(tmp_path, "bad", -0.25, outcome="bad_loss")
    write_run(tmp_path, "good", 0.5, seed=7)
    write_run(tmp_path, "open")
    write_run(tmp_path, "first", 1.0, data="zeta", metric="loss")
    write_run(tmp_path, "second", 2.0, data="zeta", metric="loss")
    report_runs(find_runs([tmp_path]), tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "all.txt").is_file() and (tmp_path / "all.csv").is_file()

    cola, zeta = figures[0].axes
    assert [axes.get_title(loc="left") for axes in (cola, zeta)] == ["cola", "zeta"]
    assert cola.get_xlabel() == "accuracy on validation (higher is better)"
    assert zeta.get_xlabel() == "loss on validation (lower is better)"
    assert [label.get_text() for label in cola.get_yticklabels()] == [
        *("good", "good", "bad (bad_loss)")
    ]
    assert [label.get_text() for label in zeta.get_yticklabels()] == ["first", "second"]
    assert [bar.get_width() for bar in cola.patches[:3]] == [0.75, 0.5, -0.25]
    assert cola.yaxis_inverted() and zeta.get_legend() is None
    legend = cola.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["test", "seed 7", "seed 42"]
    assert {"0.7500", "0.5000", "-0.2500"} <= {text.get_text() for text in cola.texts}


def test_a_picture_without_results_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, "open")
    report_runs(find_runs([tmp_path]), tmp_path / "all")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_found_at_and_below_a_directory_and_not_in_runs(tmp_path: Path) -> None:
    b = write_run(tmp_path / "deep" / "er", "b", 0.5)
    a = write_run(tmp_path / "deep" / "er", "a", 0.5)
    write_run(a / "inside", "c", 0.5)
    (tmp_path / "empty").mkdir()
    assert find_runs([tmp_path]) == [a, b]
    assert find_runs([b, tmp_path, tmp_path / "deep"]) == [b, a]
    assert find_runs([a]) == [a]


def test_no_run_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for directory, message in (
        (tmp_path, "no run in .*: nothing there holds a cfg.yaml"),
        (tmp_path / "nothing", "DIR .*nothing does not exist"),
        (tmp_path / "file", "DIR .*file is a file"),
    ):
        with pytest.raises(InputError, match=message):
            find_runs([directory])
        assert main(["report", str(directory)]) == BAD_INPUT
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match="no run"):
        report_runs([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("result.json", '{"outcome": "fini', r"result.json: not the result of a run \(JSON"),
        ("result.json", '{"outcome": "finished"}', "result.json: not the result of a run"),
        ("result.json", "[]", "result.json: not the result of a run"),
        ("cfg.yaml", "data: cola\n", "cfg.yaml has no name"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    run_dir = write_run(tmp_path, "a", 0.5)
    (run_dir / file).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        report_runs([run_dir])
    assert "\n" not in str(error.value)


def test_the_record_of_another_program_is_left_out_and_named(tmp_path: Path) -> None:
    write_run(tmp_path, "a", 0.5)
    old = tmp_path / "old"
    old.mkdir()
    (old / "cfg.yaml").write_text("data: glue-tvt_cola\noutput_dir: weights/old\nseed: 42\n")
    text = report_runs(find_runs([tmp_path]), tmp_path / "all")
    row, note = text.splitlines()[2:]
    assert row.startswith("a ")
    assert note.startswith(f"left out: {old / 'cfg.yaml'} has no name")
    assert "old" not in (tmp_path / "all.csv").read_text()


def test_what_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "a", 0.5)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--out .*: cannot be written: "):
        report_runs([run_dir], tmp_path / "file" / "all")


def test_the_command_prints_the_table_and_loads_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path, "a", 0.5)
    write_run(tmp_path, "b", 0.25)
    program = (
        "import sys; from ssm_train.cli import main; code = main(['report', sys.argv[1]]); "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (DONE, "")
    assert names(done.stdout) == ["a", "b"]
    assert (tmp_path / "report.txt").read_text(encoding="utf-8") == done.stdout
    assert (tmp_path / "report.csv").is_file() and (tmp_path / "report.png").is_file()
