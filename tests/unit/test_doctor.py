"""The doctor reports what is missing instead of failing on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssm_train import __version__, doctor
from ssm_train.errors import InputError

GPU = {"gpus": [{"name": "a GPU"}], "problem": None}
NO_GPU = {"gpus": [], "problem": "no NVIDIA GPU"}


def test_findings_are_json_and_cover_every_family() -> None:
    from ssm_train.adapters.registry import FAMILIES

    findings = json.loads(json.dumps(doctor.examine()))
    assert findings["ssm_train"] == __version__
    assert {kernel["family"] for kernel in findings["kernels"]} == set(FAMILIES)
    for kernel in findings["kernels"]:
        assert kernel["implementation"] != "reference" or kernel["reason"], kernel
    for package in findings["packages"]:
        assert (package["version"] is None) == (package["install"] is not None), package


def test_a_broken_package_of_one_family_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssm_train.adapters.registry import FAMILIES

    def broken() -> Any:
        raise OSError("libcuda.so.1: cannot open\nmore")

    monkeypatch.setitem(FAMILIES, "gla", broken)
    found = doctor.kernels_of("gla", "cpu", NO_GPU)
    assert found == [doctor.Kernel("gla", "all", None, "libcuda.so.1: cannot open")]


def test_a_broken_mamba_ssm_is_reported_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed, so that it is chosen, but its compiled part was built for another torch."""
    from ssm_train.adapters import ssd_triton

    package = tmp_path / "mamba_ssm"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('undefined symbol:\\n _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ssd_triton, "available", ssd_triton.available.__wrapped__)
    assert ssd_triton.available()
    found = {kernel.operation: kernel for kernel in doctor.kernels_of("mamba2", "cuda", GPU)}
    assert found["ssd"].implementation is None
    assert "undefined symbol" in found["ssd"].reason
    assert "pip install" in found["ssd"].reason
    assert found["causal_conv1d"].implementation == "triton"
    x = torch.ones(1, 2, 1)
    with pytest.raises(InputError) as error:
        ssd_triton.ssd_triton(x[..., None], x, torch.ones(1), x[..., None], x[..., None])
    assert "undefined symbol: _ZN3c10" in str(error.value)
    assert "kernels: reference" in str(error.value) and "\n" not in str(error.value)


def test_why_not_a_faster_kernel() -> None:
    assert doctor.reason_for("triton (fla)", GPU) == ""
    assert "no NVIDIA GPU" in doctor.reason_for("reference", NO_GPU)
    assert ".[mamba]" in doctor.reason_for("reference", GPU)


def test_import_problem_names_the_error() -> None:
    assert doctor.import_problem("json") is None
    assert "ModuleNotFoundError" in (doctor.import_problem("no_such_module") or "")


def test_tables_keep_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    package = doctor.Package("wandb", None, "trackers: [wandb]", "pip install -e '.[x]'")
    kernel = doctor.Kernel("gla", "gla", None, "why [not]")
    devices = {"cpus": 2, "threads": 1, **NO_GPU}
    doctor.show(
        {
            "python": "3.11",
            "platform": "Linux",
            "ssm_train": __version__,
            "devices": devices,
            "packages": [vars(package)],
            "kernels": [vars(kernel)],
        }
    )
    shown = capsys.readouterr().out
    for text in ("trackers: [wandb]", "'.[x]'", "cannot run", "why [not]"):
        assert text in shown
