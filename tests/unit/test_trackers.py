"""Trackers: where rows go, and that a run which goes on is the same run to them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ssm_train.errors import InputError
from ssm_train.trackers import TRACKERS, Trackers, check_trackers

CONFIG = {"peft": None, "seed": 1, "task": {}}

PACKAGE = """
import json
from pathlib import Path

class Config(dict):
    def update(self, values, allow_val_change):
        pass

class Run:
    def log(self, values, step):
        pass
    def finish(self):
        pass

config = Config()

def init(**options):
    with (Path(__file__).parent / "calls.jsonl").open("a") as file:
        file.write(json.dumps(options) + "\\n")
    return Run()
"""
"""Stands for a service's package; Accelerate's side is real."""


@pytest.fixture(autouse=True)
def one_process() -> None:
    PartialState(cpu=True)


def test_a_missing_tracker_is_named_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install swanlab"):
        check_trackers(["swanlab"])


def test_accelerate_knows_every_tracker() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) <= {str(name) for name in LOGGER_TYPE_TO_CLASS}


def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path, "run", CONFIG)
    trackers.write("train", {"step": 3, "loss": 0.25, "note": "text"})
    trackers.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 0.25)]


def started(name: str, run_dir: Path, step: int) -> Trackers:
    said: list[str] = []
    trackers = Trackers([name], run_dir, "run", CONFIG, said.append, step)
    assert not said
    return trackers


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_a_run_that_goes_on_is_the_same_run_to_a_service(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, name, raising=False)
    for run in ("one", "other"):
        (tmp_path / run).mkdir()
    for run, step in (("one", 0), ("one", 4), ("one", 6), ("other", 0)):
        started(name, tmp_path / run, step).finish()
    monkeypatch.delitem(sys.modules, name)
    known_by = "name" if name == "trackio" else "id"
    calls = [json.loads(line) for line in (package / "calls.jsonl").read_text().splitlines()]
    first, *again, other = [call[known_by] for call in calls]
    assert again == [first, first] and other != first
    assert all(call["resume"] == "allow" for call in calls)
    assert name == "trackio" or len(first) == 21  # swanlab's old rule


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    for first, last in ((0, 5), (3, 8)):  # killed in step 6, and the checkpoint is of step 3
        trackers = started("tensorboard", tmp_path, first)
        for step in range(first + 1, last + 1):
            trackers.write("train", {"step": step, "loss": step + first / 10})
        trackers.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run"))
    events.Reload()
    found = [(event.step, round(event.value, 1)) for event in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), *((k, k + 0.3) for k in range(4, 9))]
