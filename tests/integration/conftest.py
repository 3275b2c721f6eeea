"""Command lines in the tests' own process, and a place for their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from old_commands import Command

from ssm_train.cli import main
from ssm_train.overrides import DIRECTORIES, ENVIRONMENT


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without the plot at their end, which only takes time; test_commands.py looks at it."""
    monkeypatch.setattr("ssm_train.record.summary.plot_metrics", lambda run_dirs, out: out)


@pytest.fixture
def launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_plot: None
) -> Callable[..., Command]:
    """`python train.py <words>` in this process, under the variables given and none of whoever
    runs the tests; without the plot, which only takes time."""
    for variable in [*ENVIRONMENT, *DIRECTORIES]:
        monkeypatch.delenv(variable, raising=False)

    def run(*words: object, **variables: str) -> Command:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            code = main(["train", *map(str, words)])
        said = capsys.readouterr()
        return Command(code, said.out, said.err)

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")
