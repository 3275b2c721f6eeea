"""Every Triton kernel of ours compiles for real GPUs where there is none, several at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton needs Linux")

ROOT = Path(__file__).parents[2]
TARGET = """
import threading

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

loaded = []  # (thread, name) of each kernel


class Target:
    '''What Triton asks of a driver to compile for a GPU that is not there, and to load.'''

    def launcher_cls(self, src, metadata):
        return None

    class utils:
        def get_device_properties(device):
            return {"max_shared_mem": 2**17}

        def load_binary(name, binary, shared, device):
            loaded.append((threading.get_ident(), name))
            return 1, 1, 0, 0, 1024

        def unload_module(module):
            pass

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Target())
"""
COMPILE = """
import torch
from triton import knobs

from ssm_train.kernels.causal_conv1d import triton as convolution
from ssm_train.kernels.compiling import compile_ahead
from ssm_train.kernels.gla.triton import gla_step
from ssm_train.kernels.pointwise import triton as pointwise
from ssm_train.kernels.rms_norm import triton as norm
from ssm_train.kernels.selective_scan import triton as scan
from ssm_train.kernels.ssd.triton import ssd_step

compiled = set()
threads = set()


def listen(*, src, cache_hit, **about):
    assert not cache_hit
    compiled.add(f"{src.fn.__module__.split('.')[-2]}.{src.fn.__name__}")
    threads.add(threading.get_ident())


knobs.compilation.listener = listen


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


T, d, n = 64, 32, 16
offsets = torch.tensor([0, 40, T], dtype=torch.int32)
with compile_ahead():
    y, _ = scan.selective_scan(
        draw(1, T, d), draw(1, T, d, dtype=torch.float32), draw(d, n, dtype=torch.float32),
        draw(1, T, n), draw(1, T, n), D=draw(d, dtype=torch.float32), z=draw(1, T, d),
        cu_seqlens=offsets, dt_softplus=True,
    )
    y.sum().backward()
    y, _ = convolution.causal_conv1d(
        draw(1, T, d), draw(d, 4, dtype=torch.float32), draw(d, dtype=torch.float32),
        activation="silu", cu_seqlens=offsets,
    )
    y.sum().backward()
    y, total = norm.rms_norm(
        draw(T, d), draw(d, dtype=torch.float32), 1e-5, residual=draw(T, d, dtype=torch.float32)
    )
    y.grad_fn.make_again(y.grad_fn)
    (y.sum() + total.sum()).backward()
    norm.gated_rms_norm(draw(T, d), draw(T, d), None, 1e-5).sum().backward()
    pointwise.swiglu(draw(T, d), draw(T, d)).sum().backward()
    pointwise.add_bias(draw(T, d), draw(d, dtype=torch.float32))
    with torch.no_grad():
        q, k, v, g = (draw(2, 1, 2, 16) for _ in range(4))
        gla_step(q, k, v, g, torch.zeros(2, 2, 16, 16))
        ssd_step(q, q[..., 0], q[0, 0, :, 0], k, v, None, torch.zeros(2, 2, 16, 16))
print(*sorted(compiled))
assert len(threads) > 1 and threading.get_ident() not in threads, threads
assert {name for _, name in loaded} == {name.partition(".")[2] for name in compiled}, loaded
assert len(loaded) >= len(compiled) and threading.get_ident() not in dict(loaded), loaded
"""
TUNED = """
import importlib.util
import sys
from pathlib import Path

import torch
import triton
from triton import knobs

from ssm_train.kernels import choices, tuning
from ssm_train.kernels.compiling import compile_ahead

spec = importlib.util.spec_from_file_location("fla.toy_kernels", sys.argv[1])
toy = sys.modules["fla.toy_kernels"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
compiled = []
knobs.compilation.listener = lambda *, src, **about: compiled.append(src.constants[(5,)])
tuner = tuning.find_autotuners()["fla.toy_kernels.double"]
x = torch.zeros(100)


def launch():
    toy.double[(1,)](x, x, 100, ADD=False)


with compile_ahead():
    launch()
assert compiled == [] and toy.measured == []
gpu = choices.Gpu("Toy GPU", "9.0")
key = tuning.key_of(tuner, (x, x, 100), {"ADD": False})
entry = {key: tuning.describe(triton.Config({"BLOCK": 16}))}
choices.write(gpu.user_file, gpu, {"fla.toy_kernels.double": entry})
tuning.use_stored(gpu, "fla")
with compile_ahead():
    launch()
print(compiled, toy.measured, tuner.cache)
"""
KERNELS = """
causal_conv1d._gradients causal_conv1d._outputs gla._step pointwise._add_bias pointwise._swiglu
pointwise._swiglu_gradients rms_norm._gradients rms_norm._outputs
selective_scan._gradients selective_scan._outputs selective_scan._pass_states
selective_scan._sum_segments selective_scan._sum_segments_back ssd._step
"""


def run(script: str, directory: Path, capability: int, *arguments: str) -> str:
    """What a script says, in a process without the interpreter."""
    target = TARGET.replace("CAPABILITY", str(capability))
    (directory / "script.py").write_text(target + script, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(directory / "cache"),
        "XDG_CACHE_HOME": str(directory / "home"),
        "PYTHONPATH": path,
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(directory / "script.py"), *arguments],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(capability: int, tmp_path: Path) -> None:
    assert run(COMPILE, tmp_path, capability).split() == KERNELS.split()


def test_only_a_stored_choice_is_compiled_ahead(tmp_path: Path) -> None:
    """With it nothing is measured, and the autotuner still has to take it when the kernel runs."""
    toy = Path(__file__).with_name("toy_kernels.py")
    assert run(TUNED, tmp_path, 90, str(toy)).split() == ["[16]", "[]", "{}"]
