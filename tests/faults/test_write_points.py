"""kill -9 at every write point of a save: the newest whole checkpoint comes back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from kills import CASES, Saved, fork, kill_at, names_in, points_of, save_two

KILLED = -9
Survived = Callable[[str, int], None]


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_two(tmp_path_factory.mktemp(request.param), request.param)


def kill_everywhere(saved: Saved, step: int, first: int) -> int:
    """Kills a save of `step` at each of its write points; before the rename the run resumes from
    step `first`. Returns how many points there are."""
    trained, kept = saved.trained, saved.kept
    kept = kept | {step: kept[3]}

    def save(run_dir: Path) -> None:
        trained.put_back(kept[step])  # in a child, too: Python seeds its generator anew there
        trained.save(run_dir, step, best=step)

    points = points_of(lambda: save(saved.copy(f"probe-{step}")))
    renamed = points.index(("renamed", 1))
    for index, point in enumerate(points):
        run_dir = saved.copy(f"killed-{step}-{index}")
        assert fork(partial(save, run_dir), kill_at(point)) == KILLED, point
        expected = step if index >= renamed else first
        before = saved.kept if index < renamed else kept
        notes = trained.assert_resumes(run_dir, before, expected)
        assert len(notes) == 1 and f"resuming from step-{expected:08d}" in notes[0], point
        save(run_dir)
        trained.assert_resumes(run_dir, kept, step)
        assert not [name for name in names_in(run_dir) if name.endswith((".tmp", ".old"))], point
    return len(points)


def test_a_new_checkpoint(saved: Saved, survived: Survived) -> None:
    points = kill_everywhere(saved, step=3, first=2)
    assert points >= 25
    survived("kills in a save", points)


def test_the_same_step_again(saved: Saved, survived: Survived) -> None:
    """As after a resume from before a damaged checkpoint."""
    points = kill_everywhere(saved, step=2, first=2)
    assert points >= 25
    survived("kills in a save of a step that was saved before", points)


def test_beside_the_training(tmp_path: Path, survived: Survived) -> None:
    points = kill_everywhere(save_two(tmp_path, "lora", async_save=True), step=3, first=2)
    assert points >= 25
    survived("kills in a save beside the training", points)
