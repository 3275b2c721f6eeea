"""Which engine is asked for and how: environment, DeepSpeed configs, `accelerate launch`; and the
shipped files."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from ssm_train.engines import Asked, build_engine, check_launch, read_environment
from ssm_train.engines.hollow import HollowModel
from ssm_train.engines.launcher import Statement, read_command, read_parent
from ssm_train.engines.zero import SECONDS_TO_BUILD, await_build
from ssm_train.engines.zero_config import Numbers, fill_sizes, read_config
from ssm_train.errors import InputError
from ssm_train.ready import Ready

ROOT = Path(__file__).parents[2]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").rglob("*.yaml"))
NUMBERS = Numbers(prec="fp32", batch_size=4, accumulation=2, max_grad_norm=1.0)


def environ(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        monkeypatch.delenv(f"ACCELERATE_USE_{name}", raising=False)
    for name in ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_lock_that_a_killed_build_has_left_is_named(tmp_path: Path) -> None:
    await_build(tmp_path / "none")
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    end = threading.Timer(0.5, lock.unlink)  # as the process that builds does
    end.start()
    await_build(tmp_path)
    assert not lock.exists()
    lock.touch()
    then = time.time() - SECONDS_TO_BUILD - 60
    os.utime(lock, (then, then))
    with pytest.raises(InputError, match="lock says since 11 minutes that .*; remove it if no"):
        await_build(tmp_path)


# ---------------------------------------------------------------- environment


def test_what_variables_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    environ(monkeypatch)
    assert read_environment() == Asked()
    environ(monkeypatch, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert read_environment() == Asked("fsdp")
    file = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/zero2.json"}
    environ(monkeypatch, ACCELERATE_USE_DEEPSPEED="true", **file)
    assert read_environment() == Asked("zero", Path("ds_configs/zero2.json"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "set deepspeed_config_file"),
        ({"ACCELERATE_USE_FSDP": "true"}, "version 1, but only 2"),
        ({"ACCELERATE_USE_FSDP": "1", "ACCELERATE_USE_DEEPSPEED": "1"}, "at once"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ],
)
def test_what_variables_may_not_ask_for(
    values: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ(monkeypatch, **values)
    with pytest.raises(InputError, match=words):
        read_environment()


def test_fp16_is_refused_under_engines_that_do_not_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    environ(monkeypatch, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    with pytest.raises(InputError, match="fp16 .* under FSDP2"):
        build_engine(None, Numbers("fp16", 1, 1, 1.0))


# ---------------------------------------------------------------- accelerate launch

SPELLINGS = [
    ["/usr/bin/python3", "/usr/bin/accelerate", "launch"],
    ["accelerate-launch"],
    ["python", "-m", "accelerate.commands.launch"],
    ["python", "/site-packages/accelerate/commands/launch.py"],
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_flags_of_accelerate_launch(spelling: list[str]) -> None:
    flags = ["--num-processes=3", "--mixed_precision", "bf16", "--use_deepspeed"]
    said = read_command([*spelling, *flags, "-m", "ssm_train.train", "--cfg", "a.yaml"])
    assert said == Statement(None, 3, "bf16", "DEEPSPEED")


def test_flags_win_over_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("num_processes: 8\nmixed_precision: no\ndistributed_type: FSDP\n")
    launch = ["accelerate", "launch", "--config_file", str(file)]
    assert read_command([*launch, "train.py"]) == Statement(str(file), 8, "no", "FSDP")
    more = read_command([*launch, "--num_processes", "2", "train.py"])
    assert more == Statement(str(file), 2, "no", "FSDP")


def test_other_parents_say_nothing() -> None:
    assert read_command(["bash"]) == read_command(["accelerate", "config"]) == Statement()
    assert read_command(["python", "-m", "pytest", "launch.py"]) == Statement()
    assert read_parent().config_file is None


def test_a_config_file_that_cannot_be_read() -> None:
    with pytest.raises(InputError, match=r"Accelerate config nowhere\.yaml"):
        read_command(["accelerate", "launch", "--config_file", "nowhere.yaml", "train.py"])


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (Statement(num_processes=2), "2 processes, but 1 runs.*torchrun --nproc_per_node 2"),
        (Statement("a.yaml", distributed_type="DEEPSPEED"), "a.yaml asks for DEEPSPEED.*plain DDP"),
        (Statement("a.yaml", mixed_precision="no"), "'no', but prec of the run is 'bf16'"),
        (Statement(mixed_precision="fp16"), "'fp16', but prec of the run is 'bf16'"),
    ],
)
def test_what_was_asked_for_and_does_not_run(
    said: Statement, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_launch(Statement(num_processes=1, mixed_precision="bf16"), Asked(), "bf16")
    with pytest.raises(InputError, match=words):
        check_launch(said, Asked(), "bf16")


# ---------------------------------------------------------------- DeepSpeed configs


def write(directory: Path, **changes: Any) -> Path:
    path = directory / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | changes))
    return path


def test_numbers_that_agree_are_taken(tmp_path: Path) -> None:
    given = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 8,
        "gradient_clipping": 1.0,
    }
    config = read_config(write(tmp_path, **given), NUMBERS)
    # The loop counts micro-batches and divides by targets itself.
    assert config["gradient_accumulation_steps"] == config["train_batch_size"] == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gradient_accumulation_steps": 3}, "is 3, but gradient_accumulation_steps of .* is 2"),
        ({"gradient_clipping": 0.5}, "is 0.5, but max_grad_norm of the run is 1.0"),
        ({"train_micro_batch_size_per_gpu": 1}, "is 1, but batch_size of the run is 4"),
        ({"train_batch_size": 9}, "is 9, but batch_size x .* is 8"),
        ({"optimizer": {"type": "Adam"}}, "remove 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, "remove 'scheduler'"),
        ({"bf16": {"enabled": True}}, "remove 'bf16'.*need fp32"),
        ({"fp16": {"enabled": "auto"}}, "remove 'fp16'"),
        ({"zero_optimization": {"stage": 0}}, "is 0; it has to be 1, 2 or 3"),
        ({"zero_optimization": 3}, "has to be an object, and zero_opt"),
    ],
)
def test_what_contradicts_the_run(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        read_config(write(tmp_path, **given), NUMBERS)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"DeepSpeed config .*nowhere\.json"):
        read_config(tmp_path / "nowhere.json", NUMBERS)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json"):
        read_config(tmp_path / "broken.json", NUMBERS)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match=r"list\.json: it has to be an object"):
        read_config(tmp_path / "list.json", NUMBERS)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match=r"list\.yaml: it holds no keys"):
        read_command(["accelerate", "launch", "--config_file", str(tmp_path / "list.yaml"), "x.py"])


def test_a_section_that_is_off_is_no_section(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, bf16={"enabled": False}), NUMBERS)


def test_an_auto_that_nobody_knows(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, zero_optimization={"stage": 2, "what": "auto"}), NUMBERS)
    with pytest.raises(InputError, match="what: auto; give one"):
        fill_sizes(config, 100, 10)


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_deepspeed_configs(path: Path) -> None:
    config, said = fill_sizes(read_config(path, NUMBERS), trained=1000, hidden_size=64)
    assert "auto" not in json.dumps(config)
    zero = config["zero_optimization"]
    assert path.stem == f"zero{zero['stage']}" + ("_offload" if "offload_optimizer" in zero else "")
    assert zero["reduce_bucket_size"] == 1000 and "reduce_bucket_size 1,000" in said
    assert ("offload_param" in zero) == (path.stem == "zero3_offload")


# ---------------------------------------------------------------- Accelerate configs


@pytest.mark.parametrize(
    "path", ACCELERATE_CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_shipped_accelerate_configs_are_what_their_names_say(path: Path) -> None:
    engine, prec = path.stem.rsplit("_", 1)
    said = yaml.safe_load(path.read_text())
    assert said["mixed_precision"] == {"fp32": "no"}.get(prec, prec)
    types = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert said["distributed_type"] == types.get(engine, "DEEPSPEED")
    assert (said["num_machines"] > 1) == (path.parent.name == "many_nodes")
    assert (said["num_processes"] > 1) == (engine != "single")
    if engine.startswith("zero"):
        file = said["deepspeed_config"]["deepspeed_config_file"]
        assert file == f"ds_configs/{engine}.json" and (ROOT / file) in DS_CONFIGS
    if engine == "fsdp2":
        assert said["fsdp_config"]["fsdp_version"] == 2
    assert read_command(["accelerate", "launch", "--config_file", str(path), "x"]).mixed_precision


def test_there_is_one_for_each_engine_precision_and_number_of_nodes() -> None:
    found = {f"{path.parent.name}/{path.stem}" for path in ACCELERATE_CONFIGS}
    sharded = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2")
    wanted = {
        f"{nodes}/{engine}_{prec}"
        for nodes in ("one_node", "many_nodes")
        for engine in ("single", "ddp", *sharded)
        for prec in ("bf16", "fp16", "fp32")
        if not (engine == "single" and nodes == "many_nodes")
        and not (prec == "fp16" and engine in sharded)  # refused: nothing scales the loss there
    }
    assert found == wanted


# ---------------------------------------------------------------- a model without its weights


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    model.register_buffer("kept", torch.arange(3))
    return model


def test_a_hollow_model_is_the_model_while_it_is_filled() -> None:
    model, ids = tied(), torch.tensor([1, 4])
    hollow = HollowModel(model)
    assert all(p.is_meta for p in hollow.model.parameters())
    assert not any(p.is_meta for p in model.parameters())
    with hollow.filled(dict(model.named_parameters())) as filled:
        assert torch.equal(filled(ids), model(ids)) and torch.equal(filled.kept, model.kept)
        assert filled[2].weight is filled[0].weight and filled[0].weight is not model[0].weight
        assert filled[0].weight.data_ptr() == model[0].weight.data_ptr()
        assert not filled[1].weight.requires_grad and filled[1].bias.requires_grad
    assert all(p.is_meta for p in hollow.model.parameters())


def test_graphs_are_refused_where_gradients_move() -> None:
    engine = SimpleNamespace(
        device=torch.device("cuda"), keeps_gradients=False, name="ZeRO-2", shards_weights=False
    )
    cfg = SimpleNamespace(packing=True, prec="bf16", gradient_checkpointing=False, cuda_graphs=None)
    ready: Any = SimpleNamespace(engine=engine, cfg=cfg)
    assert Ready.cuda_graphs.fget(ready) is False
    cfg.cuda_graphs = True
    with pytest.raises(InputError, match="because under ZeRO-2 gradients cross"):
        Ready.cuda_graphs.fget(ready)
    engine.keeps_gradients = True
    assert Ready.cuda_graphs.fget(ready) is True
