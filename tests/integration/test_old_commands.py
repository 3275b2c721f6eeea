"""What a user of mamba-peft types and exports still does what it did: entry points, flags and
variables, each by its effect on a run. Keys are in test_old_keys.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from old_commands import PLAIN, Command, Seen
from tiny_runs import COUNTING, LORA, SIDES, make_records, write_config

from ssm_train.commands import BAD_INPUT, DONE, FAILED
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.overrides import ENVIRONMENT
from ssm_train.peft.lora import LoraMethod, lora_layers

ROOT = Path(__file__).parents[2]
# ---------------------------------------------------------------- entry points


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gla` and `mamba`: checkpoints with their tokenizer, as a hub's; and data beside them."""
    from fla.models.gla import GLAConfig, GLAForCausalLM
    from transformers import MambaConfig, MambaForCausalLM

    directory = tmp_path_factory.mktemp("bases")
    write_config(directory, "unused", "mamba")  # with the data
    texts = [f"{r['question']} => {r['answer']}" for r in make_records(60)]
    tokenizer = build_tokenizer(texts, {"type": "word"})
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 1}
    models = {
        "gla": GLAForCausalLM(GLAConfig(**size, num_heads=2, intermediate_size=48)),
        "mamba": MambaForCausalLM(MambaConfig(**size, state_size=8, time_step_rank=16)),
    }
    for family, model in models.items():
        model.save_pretrained(directory / family)
        tokenizer.save_pretrained(directory / family)
    return directory


def on_our_data(directory: Path) -> list[str]:
    """The words that put a config for the hub's model and data onto ours."""
    return [
        f"data={directory}",
        f"task={json.dumps(COUNTING)}",
        "num_data_workers=0",
        "max_steps=2",
        f"output_root={directory}/output",
    ]


QKVO = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"}
E1 = "cfg/my_lora_exp/yaml/E1_QKVO_r8_alpha16.yaml"


def test_python_train_py(bases: Path) -> None:
    """A shipped experiment, in a process of its own, with values of every layer."""
    words = [*on_our_data(bases), "--model", str(bases / "gla"), "--prec", "fp32", "seed=1"]
    variables = {
        "GRADIENT_CHECKPOINTING": "true",
        "HP_SEED": "5",
        "SSM_TRAIN_CACHE": str(bases),
        "SSM_TRAIN_OUTPUT": "unused",
    }
    done = subprocess.run(
        [sys.executable, "train.py", "--cfg", E1, *words, "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | variables,
    )
    assert (done.returncode, done.stderr) == (DONE, "")
    seen = Seen(done.stdout)
    assert seen.run_dir == bases / "output" / f"{bases.name}_seed5" / "E1_QKVO_r8_alpha16"
    assert (seen.run_dir / "cfg.yaml").is_file()
    lines = (ROOT / E1).read_text().splitlines()
    (place,) = [f"{E1}:{i}" for i, line in enumerate(lines, start=1) if "learning_rate" in line]
    for line in (
        f"  learning_rate = 0.0003  ({place})",
        f"  model = {bases / 'gla'}  (command line)",
        "  prec = fp32  (command line)",
        "  seed = 5  (HP_SEED)",
        f"  cache_dir = {bases}  (SSM_TRAIN_CACHE)",
        "1 process on cpu",
        "model gla: config.json has model_type gla",
        "best by loss; without eval_gen nothing is generated: no bleu, rougeL, exact_match",
    ):
        assert line in done.stdout.splitlines()
    adapter = seen.file("adapter/adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"]) == (8, 16)
    assert all(name.endswith(tuple(QKVO)) for name in adapter["target_modules"])


@pytest.mark.parametrize(
    "name, family, targets",
    [
        ("lora_qkvo_r8_a16", "GLA", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("lora_in_out_proj_r8_a16", "Mamba", ("in_proj", "out_proj")),
    ],
)
def test_a_peft_json_as_config(
    name: str, family: str, targets: tuple[str, ...], bases: Path, launch: Callable[..., Command],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    path, model = f"cfg/peft/lora/{name}.json", bases / family.lower()
    words = ("--cfg", path, "--model", model, "--device", "cpu", "skip_eval=true")
    done = launch(*words, *on_our_data(bases))
    assert (done.code, done.error) == (DONE, "")
    seen = Seen(done.out)
    assert seen.run_dir.name == name
    assert f"  peft = {path}  (default {family} run)\n" in seen.said
    adapter = seen.file("adapter/adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"]) == (8, 16)
    assert all(module.endswith(targets) for module in adapter["target_modules"])


def test_hp_variables_before_the_command(
    bases: Path, launch: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ("--cfg", E1, "--model", bases / "gla", "--device", "cpu", "name=hp", "--overwrite")
    done = launch(*words, *on_our_data(bases), HP_PEFT_R="16", HP_INIT="pissa")
    assert (done.code, done.error) == (DONE, "")
    seen = Seen(done.out)
    settings = seen.file("peft.json")
    assert (settings["r"], settings["init_lora_weights"]) == (16, "pissa")
    assert seen.file("adapter/adapter_config.json")["r"] == 32  # right against the original base


def test_accelerate_launch_owns_a_directory_until_it_is_killed(
    place: Path, launch: Callable[..., Command]
) -> None:
    long = {"max_steps": 100_000, "save_steps": 20, "logging_steps": 20, "skip_eval": True}
    config = write_config(place, "owned", "mamba", **PLAIN | long)
    run_dir = place / "output" / "train_seed42" / "owned"
    lock = run_dir.with_name("owned.lock")
    words = ["-m", "ssm_train.train", "--cfg", str(config), "--lock"]
    with subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        + ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *words],
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as first:
        try:
            assert first.stdout is not None
            out = iter(first.stdout.readline, "")
            assert "1 process on cpu\n" in out  # reads until it is said
            assert any(line.startswith("step 40/") for line in out)
            owner = json.loads(lock.read_text())["pid"]
            for flags in (["--lock"], ["--lock", "--overwrite"], ["--resume"], ["--overwrite"]):
                refused = launch("--cfg", config, *flags)
                assert (refused.code, refused.out) == (BAD_INPUT, "")
                assert f"error: lock: process {owner} owns {run_dir}; wait for" in refused.error
            then = max(Seen(f"run {run_dir}\n").saved) + 40
            assert any(line.startswith(f"step {then}/") for line in out), "unharmed"
        finally:
            os.killpg(first.pid, signal.SIGKILL)
    assert lock.exists()
    assert "already holds a run" in launch("--cfg", config, "--lock").error
    last = max(Seen(f"run {run_dir}\n").saved)
    done = launch("--cfg", config, "--lock", "--resume", f"max_steps={last + 5}")
    assert (done.code, done.error) == (DONE, "")
    assert f"resuming from step-{last:08d}" in done.out
    assert not lock.exists()


# ---------------------------------------------------------------- flags


def test_flags_win_over_the_file(
    bases: Path, tmp_path: Path, launch: Callable[..., Command]
) -> None:
    config = write_config(
        tmp_path, "flags", "mamba", **PLAIN | {"new_model": None, "tokenizer": None},
        model=str(bases / "gla"), prec="bf16", device="cuda", debug=False,
    )  # fmt: skip
    run_dir = tmp_path / "output" / "train_seed42" / "flags"
    words = ("--cfg", config, "--model", bases / "mamba", "--prec", "fp32", "--device", "cpu")
    done = launch(*words, "--debug", "--lock")
    assert (done.code, done.error) == (DONE, "")
    for line in ("model mamba: config.json", "1 process on cpu", "; 2 steps, 2 an epoch"):
        assert line in done.out
    for key in ("model", "prec", "device", "debug", "lock"):
        assert f"  {key} = " in done.out and "(command line)" in done.out.split(f"  {key} = ")[1]
    recorded = yaml.safe_load((run_dir / "cfg.yaml").read_text())
    assert [recorded[key] for key in ("prec", "device", "debug", "lock")] == [
        *("fp32", "cpu", True, True)
    ]
    assert not run_dir.with_name("flags.lock").exists()

    (run_dir / "leftover").touch()
    again = launch(*words, "--debug")
    assert again.code == BAD_INPUT and "--resume" in again.error and "--overwrite" in again.error
    assert (run_dir / "leftover").exists()
    resumed = launch(*words, "--debug", "--resume", "max_steps=2")
    assert resumed.code == DONE and "resuming from step-00000002" in resumed.out
    assert launch(*words, "--debug", "--overwrite").code == DONE
    assert not (run_dir / "leftover").exists()


def test_switches_in_the_file_count(place: Path, launch: Callable[..., Command]) -> None:
    config = write_config(
        place, "switches", "mamba", **PLAIN | {"max_steps": 1}, overwrite=True, lock=True,
        skip_eval=True,
    )  # fmt: skip
    run_dir = place / "output" / "train_seed42" / "switches"
    assert launch("--cfg", config).code == DONE
    (run_dir / "leftover").touch()
    resumed = launch("--cfg", config, "--resume")
    assert resumed.code == DONE and "overwrite = false  (command line)" in resumed.out
    assert (run_dir / "leftover").exists()
    run_dir.with_name("switches.lock").write_text('{"host": "elsewhere", "pid": 1}')
    refused = launch("--cfg", config)
    assert refused.code == BAD_INPUT and "on host elsewhere" in refused.error
    run_dir.with_name("switches.lock").unlink()
    assert launch("--cfg", config).code == DONE
    assert not (run_dir / "leftover").exists()


@pytest.mark.parametrize("device", ["0", "cuda", "cuda:0"])
def test_device_selects(device: str, place: Path, launch: Callable[..., Command]) -> None:
    config = write_config(place, "device", "mamba", **PLAIN | {"max_steps": 1}, overwrite=True)
    done = launch("--cfg", config, "--device", device)
    if torch.cuda.is_available():
        assert done.code == DONE and "1 process on cuda" in done.out
    else:
        assert done.code == BAD_INPUT and f"device: {device!r} asked for" in done.error


@pytest.mark.parametrize(
    "changes, code, outcome, steps",
    [
        (
            {"learning_rate": 1e30, "max_steps": 40},
            FAILED,
            "the last of them bad (max_bad_steps)",
            11,
        ),
        ({"task": SIDES, "min_eval_metric_after_epoch": {1: 1.01}}, DONE, "accuracy is below", 6),
    ],
    ids=["NaN", "low"],
)
def test_a_run_that_stops_itself(
    changes: dict[str, Any], code: int, outcome: str, steps: int, place: Path,
    launch: Callable[..., Command], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    name = request.node.callspec.id
    done = launch(
        "--cfg", write_config(place, name, "mamba", **PLAIN | {"num_epochs": 9} | changes)
    )
    assert (done.code, done.error) == (code, "")
    assert f"ended after {steps} steps" in done.out and outcome in done.out
    assert (Seen(done.out).run_dir / "adapter").exists() == (code == DONE)


# ---------------------------------------------------------------- variables


def test_variables_win_over_flags_and_file(
    bases: Path, tmp_path: Path, launch: Callable[..., Command]
) -> None:
    config = write_config(
        tmp_path, "run", "mamba", **PLAIN, batch_size=2, seed=1, lr_scheduler_type="linear",
    )  # fmt: skip
    variables = {
        "HP_DATA": str(bases),
        "HP_VAL_SPLIT": "test",
        "HP_BATCH_SIZE": "8",
        "HP_EVAL_BATCH_SIZE": "5",
        "HP_TOKENS_PER_BATCH": "16384",  # without packing only the default is right
        "HP_LR": "1e-3",
        "HP_EPOCHS": "9",
        "HP_MAX_STEPS": "5",
        "HP_PREC": "fp32",
        "HP_SEED": "3",
        "HP_LOGGING_STEPS": "1",
        "HP_EVAL_STEPS": "4",
        "HP_SAVE_STEPS": "2",
        "NUM_DATA_WORKERS": "0",
        "GRADIENT_CHECKPOINTING": "true",
        "LOGITS_TO_KEEP": "1",
        "LR_SCHEDULER_TYPE": "constant_with_warmup",
        "LR_WARMUP_STEPS": "2",
        "LR_WARMUP_RATIO": "0.9",
    }
    assert set(variables) == {name for name in ENVIRONMENT if "." not in ENVIRONMENT[name]}
    words = ("seed=2", "learning_rate=1.0", "val_data=null", "--prec", "bf16")
    done = launch("--cfg", config, *words, EVAL_GEN="1", HP_LR_TYPO="", **variables)
    assert (done.code, done.error) == (DONE, "")
    assert done.out.startswith("EVAL_GEN is set, but not read; set eval_gen instead\n")
    seen = Seen(done.out)
    assert seen.run_dir == tmp_path / "output" / f"{bases.name}_seed3" / "run"
    assert seen.column("step") == [1, 2, 3, 4, 5]
    assert seen.column("learning_rate") == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-3])
    assert seen.column("step", "val") == [4, 5]
    assert "data 24 train, 7 val, 7 test examples; 5 steps, 3 an epoch" in seen.said
    assert seen.saved == [4, 5]
    recorded = seen.file("environment.json")["environment"]
    for variable, value in variables.items():
        assert f"({variable})\n" in seen.said
        assert recorded[variable] == value


@dataclass
class Injected:
    """What PEFT made of a run's LoRA."""

    layers: list[Any]
    init: bool | str

    def all(self, attribute: str) -> set[Any]:
        return {getattr(layer, attribute)["default"] for layer in self.layers}


@pytest.fixture
def inject(
    place: Path, launch: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Injected]:
    """A run of one step under variables: its LoRA layers, looked at after the injection."""

    def run(init: bool | str = True, **variables: str) -> Injected:
        found: list[Injected] = []
        original = LoraMethod.inject

        def looked_at(self: LoraMethod, prepared: Any) -> None:
            original(self, prepared)
            config = prepared.model.peft_config["default"]
            layers = list(lora_layers(prepared.model).values())
            found.append(Injected(layers, config.init_lora_weights))

        with monkeypatch.context() as patch:
            patch.setattr(LoraMethod, "inject", looked_at)
            peft = LORA | {"init_lora_weights": init}
            config = write_config(
                place, "injected", "mamba", **PLAIN | {"max_steps": 1, "peft": peft},
                skip_eval=True, no_save=True, overwrite=True,
            )  # fmt: skip
            done = launch("--cfg", config, **variables)
        assert (done.code, done.error) == (DONE, "")
        for variable in variables:
            assert f"({variable})" in done.out
        (injected,) = found
        assert len(injected.layers) == 4
        return injected

    return run


def test_lora_variables_reach_the_injected_layers(inject: Callable[..., Injected]) -> None:
    plain = inject()
    assert (plain.all("r"), plain.all("scaling")) == ({2}, {8 / 2})
    assert (plain.all("use_dora"), plain.init) == ({False}, True)
    assert {layer.lora_dropout["default"].p for layer in plain.layers} == {0.2}
    changed = inject(
        HP_PEFT_R="4", HP_PEFT_ALPHA="32", HP_PEFT_DROPOUT="0.05", HP_USE_RSLoRA="1",
        HP_USE_DORA="yes", HP_PEFT_TYPE="lora",
    )  # fmt: skip
    assert (changed.all("r"), changed.all("scaling")) == ({4}, {32 / 4**0.5})
    assert changed.all("use_dora") == {True}
    assert {layer.lora_dropout["default"].p for layer in changed.layers} == {0.05}
    shapes = {layer.lora_A["default"].weight.shape[0] for layer in changed.layers}
    assert shapes == {4}
    assert inject(HP_USE_DORA="0").all("use_dora") == {False}


@pytest.mark.parametrize(
    "written, variables, init",
    [
        (True, {"HP_INIT": "pissa"}, "pissa"),
        ("olora", {"HP_INIT": "pissa_niter_4"}, "pissa_niter_4"),
        ("pissa", {"HP_PISSA_FAST": "1"}, "pissa_niter_4"),
        ("pissa", {"HP_PISSA_FAST": "0"}, "pissa"),
        ("pissa_niter_2", {"HP_PISSA_FAST": "1"}, "pissa_niter_2"),
        (True, {"HP_PISSA_FAST": "1"}, True),
        (True, {"HP_PISSA_FAST": "1", "HP_INIT": "pissa"}, "pissa"),
        ("pissa", {"HP_PISSA_FAST": "true", "HP_INIT": "olora"}, "olora"),
    ],
)
def test_initialisation_by_variables(
    written: bool | str, variables: dict[str, str], init: bool | str,
    inject: Callable[..., Injected],
) -> None:  # fmt: skip
    assert inject(written, **variables).init == init
