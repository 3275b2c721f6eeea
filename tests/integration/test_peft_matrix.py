"""The support matrix: every cell works or is refused as the table says, and docs/support_matrix.md
is what these tests find. `make matrix` sets MATRIX_OUT: the run then writes that page.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from matrix.cell import DEVICE, Cell
from matrix.checks import CHECKS, Verdict, check_processes
from matrix.methods import CELLS, METHODS, REFUSED
from matrix.one_step import file_of, take_steps_in_two_processes
from matrix.page import PAGE, Names, read_page, write_page
from safetensors.torch import load_file
from tiny_runs import train, write_config

from ssm_train.errors import InputError
from ssm_train.peft.lora import INITS
from ssm_train.peft.registration import CONFIGS

OUT = os.environ.get("MATRIX_OUT")
COMPARED = DEVICE.type == "cpu" and not OUT
"""Whether the page in docs, which is of a CPU, is what is tested."""

REFUSED_RUN = ("state", "gla")

verdicts: dict[Names, dict[str, Verdict]] = {}
refusals: dict[Names, str] = {}


@pytest.fixture(scope="module")
def page() -> dict[Names, list[str]]:
    return read_page(PAGE.read_text(encoding="utf-8")) if COMPARED else {}


@pytest.fixture(scope="module")
def of_two_processes(request: Any, tmp_path_factory: Any) -> Iterator[Path]:
    """Where the steps of two processes are, for the cells that this run tests."""
    directory = tmp_path_factory.mktemp("two_processes")
    items = [item for item in request.session.items if "of_two_processes" in item.fixturenames]
    if DEVICE.type == "cpu":
        take_steps_in_two_processes([item.callspec.params["names"] for item in items], directory)
    yield directory


@pytest.mark.parametrize("names", CELLS, ids="-".join)
def test_it_works(names: Names, of_two_processes: Path, page: Any, tmp_path: Path) -> None:
    cell = Cell(*names)
    found = {column: check(cell, tmp_path / column) for column, check in CHECKS.items()}
    if DEVICE.type == "cpu":
        found["two processes"] = check_processes(cell, load_file(of_two_processes / file_of(names)))
    else:
        found["two processes"] = Verdict(True, "not run: on one GPU")
    verdicts[names] = found
    assert not {column: verdict.text for column, verdict in found.items() if not verdict.works}
    if COMPARED:
        assert page.get(names) == [v.text for v in found.values()], "run `make matrix`"


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_it_is_refused_with_one_line(name: str, family: str, page: Any) -> None:
    with pytest.raises(InputError) as error:
        Cell(name, family, "fp32")
    line = str(error.value)
    refusals[name, family, ""] = line
    assert "\n" not in line
    if COMPARED:
        assert page.get((name, family, "")) == [line], "run `make matrix`"


def test_a_run_refuses_with_the_same_line(tmp_path: Path) -> None:
    name, family = REFUSED_RUN
    settings = METHODS[name].settings_of(family)
    with pytest.raises(InputError) as of_cell:
        Cell(name, family, "fp32")
    with pytest.raises(InputError) as of_run:
        train(write_config(tmp_path, "refused", family, peft=settings))
    assert str(of_run.value) == str(of_cell.value)
    assert not (tmp_path / "output").exists()


def test_the_page_is_written_or_complete(page: Any) -> None:
    if OUT:
        Path(OUT).write_text(write_page(verdicts, refusals), encoding="utf-8")
        page = read_page(Path(OUT).read_text(encoding="utf-8"))
        for names, found in verdicts.items():
            assert page[names] == [verdict.text for verdict in found.values()]
    if OUT or COMPARED:
        assert page.keys() == {*CELLS, *((name, family, "") for name, family in REFUSED)}


def test_every_method_has_a_row() -> None:
    """Each peft_type of ours, each mode of it that is chosen by name, each init of LoRA."""
    settings = [method.settings for method in METHODS.values() if method.settings]
    assert {json["peft_type"] for json in settings} == {"LORA", *CONFIGS}
    inits = {str(json.get("init_lora_weights", True)) for json in settings}
    for init in INITS.split(", "):
        stem = init.partition("<")[0]
        assert any(name.lower().startswith(stem) for name in inits), init
    for name, config in CONFIGS.items():
        rows = [json for json in settings if json["peft_type"] == name]
        for key, field in config.tuner.settings_class.model_fields.items():
            if "mode" in key.split("_"):
                modes = {json.get(key, field.default) for json in rows}
                assert modes == {*get_args(field.annotation)}, (name, key)


@pytest.mark.parametrize("name", METHODS)
def test_what_must_work_is_not_among_the_refused(name: str) -> None:
    """The stock methods on GLA, Mamba-1 and Mamba-2, and our own on Mamba-1 or, for GLA, there."""
    method = METHODS[name]
    stock = not method.settings or method.settings["peft_type"] == "LORA"
    if name in ("freeze_gates", "gla_sd_lora"):
        assert "gla" in method.families
    elif stock and name != "lora_slices":
        assert {"gla", "mamba", "mamba2"} <= {*method.families}
    else:
        assert "mamba" in method.families
