"""Stored choices stand in for the search where they are right for the arguments, and only there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import one_config
import pytest
import torch
import triton
from triton.runtime.autotuner import Autotuner

from ssm_train.kernels import choices, tuning
from ssm_train.kernels.choices import Choices, Gpu, load, read, write
from ssm_train.kernels.tuning import (
    collect,
    compile_share,
    distance,
    find_autotuners,
    key_of,
    tune_anew,
    use_stored,
)

GPU = Gpu("Toy GPU 80GB", "9.0")
ROOT = Path(__file__).parents[2]
NAME = "fla.toy_kernels.double"


@pytest.fixture(autouse=True)
def no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FLA_CACHE_MODE", raising=False)


@pytest.fixture(autouse=True)
def every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with --one-config."""
    monkeypatch.setattr(Autotuner, "prune_configs", one_config.PRUNE)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernel's module, fresh, as if fla had loaded it."""
    path = Path(__file__).with_name("toy_kernels.py")
    spec = importlib.util.spec_from_file_location("fla.toy_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fla.toy_kernels", module)
    spec.loader.exec_module(module)
    return module


def run(toy: ModuleType, device: str, n: int, add: bool = False) -> int:
    """The BLOCK that the kernel ran with; its result is checked."""
    x = torch.arange(n, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    toy.double[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, y, n, ADD=add)
    assert torch.equal(y, 2 * x + add)
    return int(toy.launched[-1])


def key(n: int, add: bool = False) -> tuple[Any, ...]:
    return (n, add, "torch.float32", "torch.float32")


def config(block: int) -> dict[str, Any]:
    return tuning.describe(triton.Config({"BLOCK": block}))


def store(path: Path, blocks: dict[int, int], gpu: Gpu = GPU) -> None:
    """Choices of the toy kernel: n -> BLOCK."""
    write(path, gpu, {NAME: {key(n): config(block) for n, block in blocks.items()}})


# ---------------------------------------------------------------- where they are


def test_the_autotuners_of_fla_are_found() -> None:
    from ssm_train.adapters.registry import gla

    gla()
    found = find_autotuners()
    assert {
        "fla.ops.common.chunk_h.chunk_fwd_kernel_h",  # plain, under heuristics
        "fla.ops.gla.chunk.chunk_gla_bwd_kernel_inter",  # fla's own class
        "fla.modules.activations.ops.swiglu_fwd_kernel",  # without heuristics
    } <= set(found)
    assert len({id(tuner) for tuner in found.values()}) == len(found) > 100


def test_a_kernel_of_another_package_is_none(toy: ModuleType) -> None:
    assert NAME in find_autotuners(("fla",))
    assert NAME not in find_autotuners(("mamba_ssm",))


def test_the_key_is_triton_s(toy: ModuleType, kernel_device: str) -> None:
    run(toy, kernel_device, 100, add=True)
    x = torch.empty(100)
    tuner = find_autotuners()[NAME]
    arguments = {"ADD": True, "EVEN": True, "grid": (1,), "warmup": False}
    assert [key_of(tuner, (x, x, 100), arguments)] == list(tuner.cache) == [key(100, add=True)]


# ---------------------------------------------------------------- which is taken


def test_without_a_choice_triton_measures(toy: ModuleType, kernel_device: str) -> None:
    line = use_stored(GPU, "fla")
    assert line.startswith("no stored fla kernel choices for Toy GPU 80GB: its kernels are tuned")
    assert "ssm-train warmup" in line
    assert run(toy, kernel_device, 100) == toy.FASTEST
    assert toy.measured == list(toy.BLOCKS)


def test_a_stored_choice_is_not_measured(toy: ModuleType, kernel_device: str) -> None:
    store(GPU.user_file, {100: 16})
    line = use_stored(GPU, "fla")
    assert line == f"stored fla kernel choices for Toy GPU 80GB: {GPU.user_file}"
    assert run(toy, kernel_device, 100) == run(toy, kernel_device, 100) == 16
    assert toy.launched == [16, 16] and toy.measured == []  # with the configuration's own hook


def test_the_nearest_size_is_taken(toy: ModuleType, kernel_device: str) -> None:
    store(GPU.user_file, {64: 16, 4096: 64, 100: 8})
    use_stored(GPU, "fla")
    assert [run(toy, kernel_device, n) for n in (100, 70, 2000)] == [8, 16, 64]
    assert toy.measured == []
    assert run(toy, kernel_device, 100, add=True) == 8  # another flag: not measured either
    assert toy.measured == []


def test_distances() -> None:
    own = (64, True, "torch.bfloat16", "torch.int32")
    assert distance(own, own) == 0
    assert distance(own, own[:3]) == 0  # without packing there is no tensor of offsets
    assert distance((64, 2), (32, 4)) == pytest.approx(2 * distance((64,), (32,)))
    sizes = distance((64, True, "torch.bfloat16"), (8192, True, "torch.bfloat16"))
    for other in (
        (64, False, "torch.bfloat16"),
        (64, True, "torch.float32"),
        (64, True, "torch.bfloat16", "torch.float32"),
        (0, True, "torch.bfloat16"),
    ):
        assert sizes < distance(own, other) < float("inf"), other
    assert distance(own, own[1:]) == float("inf")


def test_what_the_kernel_prunes_is_not_taken(toy: ModuleType, kernel_device: str) -> None:
    store(GPU.user_file, {24: 32})
    use_stored(GPU, "fla")
    with pytest.warns(UserWarning, match="is tuned now"):
        assert run(toy, kernel_device, 20) == 16  # 32 would be larger than n
    assert toy.measured == [8, 16]
    store(GPU.user_file, {500: 8})
    use_stored(GPU, "fla")
    assert run(toy, kernel_device, 21) == 8  # the next nearest
    assert toy.measured == [8, 16]


def test_what_the_kernel_no_longer_has_is_not_taken(toy: ModuleType, kernel_device: str) -> None:
    store(GPU.user_file, {100: 48})
    use_stored(GPU, "fla")
    with pytest.warns(UserWarning, match="double has no stored choice and is tuned now"):
        assert run(toy, kernel_device, 100) == toy.FASTEST
    assert toy.measured == list(toy.BLOCKS)


def test_what_does_not_fit_is_tuned_after_all(toy: ModuleType, kernel_device: str) -> None:
    toy.too_large.add(64)
    store(GPU.user_file, {4096: 64})
    use_stored(GPU, "fla")
    with pytest.warns(UserWarning, match="is tuned now"):
        assert run(toy, kernel_device, 100) == toy.FASTEST


def test_a_real_kernel_of_fla(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssm_train.adapters.registry import gla

    gla()
    from fla.ops.utils import chunk_local_cumsum

    name = "fla.ops.utils.cumsum.chunk_local_cumsum_vector_kernel"
    tuner = find_autotuners()[name]
    measured = []

    def measure(kernel: Any, quantiles: object) -> list[float]:
        kernel()
        measured.append(len(measured))
        return [abs(len(measured) - 3.0)] * 3  # the third is the fastest

    monkeypatch.setattr(tuner, "cache", {})
    monkeypatch.setitem(vars(tuner), "do_bench", measure)
    monkeypatch.setattr(tuner, "cache_results", False)
    x = torch.randn(1, 64, 2, 16, device=kernel_device)
    right = chunk_local_cumsum(x, chunk_size=16)
    chosen = collect()[name]
    assert measured and list(chosen.values()) == [tuning.describe(tuner.configs[2])]
    measured.clear()
    write(GPU.user_file, GPU, {name: chosen})
    monkeypatch.setattr(tuner, "cache", {})
    monkeypatch.setattr(tuner, "run", tuner.run)  # put back after the test
    use_stored(GPU, "fla")
    assert torch.equal(chunk_local_cumsum(x, chunk_size=16), right)
    assert chunk_local_cumsum(x.repeat(3, 1, 1, 1), chunk_size=16).shape[0] == 3  # B is in the key
    assert measured == [] and set(tuner.cache.values()) == {tuner.configs[2]}


# ---------------------------------------------------------------- files


def test_choices_come_back_from_their_file(
    toy: ModuleType, kernel_device: str, tmp_path: Path
) -> None:
    run(toy, kernel_device, 100)
    run(toy, kernel_device, 20)
    chosen = {NAME: collect()[NAME]}
    assert chosen == {NAME: {key(100): config(32), key(20): config(16)}}
    path = tmp_path / "deep" / "choices.json"
    write(path, GPU, chosen)
    assert read(path) == chosen
    write(path, GPU, {NAME: {key(20): config(8), key(7): config(8)}})  # laid over it
    assert read(path)[NAME] == {key(100): config(32), key(20): config(8), key(7): config(8)}
    header = json.loads(path.read_text(encoding="utf-8"))
    assert (header["gpu"], header["capability"]) == ("Toy GPU 80GB", "9.0")
    assert header["versions"]["triton"] == triton.__version__
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]


def test_a_user_s_choice_wins_entry_by_entry(tmp_path: Path) -> None:
    store(choices.SHIPPED / "Toy_GPU_80GB.json", {1: 8, 2: 8})
    store(GPU.user_file, {2: 16, 3: 16})
    found, sources = load(GPU)
    expected: Choices = {NAME: {key(1): config(8), key(2): config(16), key(3): config(16)}}
    assert found == expected
    assert sources == [str(GPU.user_file), "shipped"]


def test_a_gpu_of_the_same_capability_lends_its_choices() -> None:
    store(choices.SHIPPED / "A.json", {1: 8}, Gpu("A", "8.0"))
    store(choices.SHIPPED / "B.json", {1: 16}, Gpu("B", "9.0"))
    found, sources = load(GPU)
    assert found[NAME] == {key(1): config(16)}
    assert sources == ["shipped for B, also of 9.0"]
    assert load(Gpu("C", "7.5")) == ({}, [])
    store(choices.SHIPPED / GPU.file_name, {1: 32})
    assert load(GPU) == ({NAME: {key(1): config(32)}}, ["shipped"])


def test_choices_of_another_package_are_none_of_this_one() -> None:
    store(GPU.user_file, {1: 8})
    assert use_stored(GPU, "mamba_ssm").startswith("no stored mamba_ssm kernel choices")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kernels": {"a": [{"key": 1}]}}'])
def test_a_file_that_cannot_be_read_is_named(text: str) -> None:
    GPU.user_file.parent.mkdir(parents=True)
    GPU.user_file.write_text(text, encoding="utf-8")
    assert f"{GPU.user_file} cannot be read" in use_stored(GPU, "fla")


def test_fla_s_own_cache_is_left_to_who_asked_for_it(
    toy: ModuleType, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(GPU.user_file, {100: 16})
    monkeypatch.setenv("FLA_CACHE_MODE", "full")
    assert "FLA_CACHE_MODE is set" in use_stored(GPU, "fla")
    assert run(toy, kernel_device, 100) == toy.FASTEST


def test_shipped_files_are_sound() -> None:
    for path in (Path(choices.__file__).parent / "tuned").glob("*.json"):
        header = choices.header(path)
        gpu = Gpu(header["gpu"], header["capability"])
        assert path.name == gpu.file_name and header["versions"]["triton"]
        assert read(path), path


# ---------------------------------------------------------------- how they are made


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_shares_cover_every_configuration_once(
    toy: ModuleType, kernel_device: str, count: int
) -> None:
    tuner = find_autotuners()[NAME]
    compiled = []
    for index in range(count):
        tuner.cache.clear()
        toy.launched.clear()
        with compile_share(index, count):
            used = run(toy, kernel_device, 100)
        share = list(toy.BLOCKS[index::count])
        assert toy.launched[:-1] == share or (not share and toy.launched[:-1] == [8])
        assert used == toy.launched[0]
        compiled += share
    assert sorted(compiled) == list(toy.BLOCKS)
    assert toy.measured == []
    tuner.cache.clear()
    assert run(toy, kernel_device, 100) == toy.FASTEST  # as if nothing had been
    assert toy.measured == list(toy.BLOCKS)


def test_a_share_that_does_not_fit_goes_on(toy: ModuleType, kernel_device: str) -> None:
    toy.too_large.update((8, 64))
    with compile_share(3, 4):
        assert run(toy, kernel_device, 100) == 16
    assert toy.launched == [64, 8, 16, 16]


def test_tuning_anew_looks_at_nothing_stored(toy: ModuleType, kernel_device: str) -> None:
    store(GPU.user_file, {100: 16})
    use_stored(GPU, "fla")
    tuner = find_autotuners()[NAME]
    tuner.cache_results = True
    said: list[str] = []
    with tune_anew(said.append):
        assert run(toy, kernel_device, 100) == run(toy, kernel_device, 100) == toy.FASTEST
    assert len(said) == 1 and said[0].startswith(f"{NAME}  BLOCK: 32, num_warps: 4")
    assert tuner.cache_results
    assert collect()[NAME] == {key(100): config(32)}
    assert run(toy, kernel_device, 101) == 16  # stored ones count again


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssm_train.kernels.compiling import tell_compiling

@triton.jit
def store_numbers(x, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(x + places, places)

def compile_for(size):
    signature = {"x": "*i32", "N": "constexpr"}
    source = ASTSource(store_numbers, signature, {"N": size})
    triton.compile(source, target=GPUTarget("cuda", 80, 32))

before = triton.knobs.compilation.listener
with tell_compiling(print, seconds=0):
    for size in (16, 16, 32):
        compile_for(size)
with tell_compiling(print, seconds=3600):
    compile_for(64)
assert triton.knobs.compilation.listener is before
"""


def test_compilations_are_counted(tmp_path: Path) -> None:
    """Without the interpreter; what comes from Triton's cache on disk is none."""
    (tmp_path / "compile.py").write_text(COMPILE, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "compile.py")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"compiling kernels: {n} so far" for n in (1, 2)]


# ---------------------------------------------------------------- --one-config


def test_the_one_configuration_is_small() -> None:
    def made(block: int, warps: int, stages: int) -> triton.Config:
        return triton.Config({"BK": block, "SPLIT": True}, num_warps=warps, num_stages=stages)

    configs = [made(16, 8, 2), made(64, 4, 2), made(32, 4, 2), made(16, 4, 3), made(16, 1, 2)]
    assert one_config.choose(configs) is configs[2]


def test_one_configuration_is_left_of_those_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssm_train.adapters.registry import gla

    gla()
    tuner = find_autotuners()["fla.ops.gla.chunk.chunk_gla_bwd_kernel_inter"]
    monkeypatch.setattr(tuner, "nargs", {}, raising=False)
    sizes = {"K": 64, "V": 64, "STATE_V_FIRST": False}
    several = tuner.prune_configs(sizes)
    wrong = one_config.choose(several)

    def leave_out(configs: list[Any], nargs: dict[str, Any], **_: Any) -> list[Any]:
        return [config for config in configs if config is not wrong]

    monkeypatch.setattr(Autotuner, "prune_configs", one_config.prune_to_one)
    assert len(several) > 1 and tuner.prune_configs(sizes) == [wrong]
    monkeypatch.setattr(tuner, "early_config_prune", leave_out)
    (left,) = tuner.prune_configs(sizes)
    assert left in several and left is not wrong


def test_a_kernel_of_the_user_keeps_its_configurations(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = find_autotuners()[NAME]
    monkeypatch.setattr(tuner, "nargs", {"n": 100}, raising=False)
    monkeypatch.setattr(tuner.base_fn, "__module__", "somebody.kernels")
    assert len(one_config.prune_to_one(tuner, {})) == len(toy.BLOCKS)
