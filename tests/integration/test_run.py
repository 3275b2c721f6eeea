"""Whole runs in one process: stopped and resumed, packed, never moved by a zero learning rate,
exported from the best step, refused when a matrix would train in vain."""

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    LORA,
    PISSA,
    SIDES,
    assert_same_run,
    assert_same_tensors,
    exported,
    losses,
    metrics,
    stop_in_step,
    train,
    write_config,
)

from ssm_train.adapters.bamba import BambaAdapter
from ssm_train.commands import REQUEUE
from ssm_train.config import load_config
from ssm_train.errors import InputError
from ssm_train.finished import evaluate_run, load_run
from ssm_train.lock import own
from ssm_train.loop import train_step

pytestmark = pytest.mark.usefixtures("no_plot")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """family -> a directory with a model that full fine-tuning made."""
    directory = tmp_path_factory.mktemp("bases")

    def of(family: str) -> str:
        path = directory / f"{family}.yaml"
        if not path.exists():
            train(write_config(directory, family, family, max_steps=4, skip_eval=True))
        return str(directory / "output" / "train_seed42" / family / "model")

    return of


def from_base(bases, family):
    return {"new_model": None, "tokenizer": None, "model": bases(family)}


# ---------------------------------------------------------------- resume

RESUMED = {
    "gla_lora": ("gla", {"peft": LORA, "logging_steps": 4}),
    "mamba_lora": ("mamba", {"peft": LORA}),
    "mamba_pissa": ("mamba", {"peft": PISSA}),
    "mamba_state": (
        "mamba",
        {"peft": {"peft_type": "SSMPEFT", "scan": {"type": "init_state"}, "conv_init_state": True}},
    ),
    "mamba_affix": ("mamba", {"peft": {"peft_type": "AFFIX_TUNING", "num_virtual_tokens": 2}}),
    "gla_bitfit": ("gla", {"peft": {"peft_type": "BITFIT", "target_modules": ["o_proj"]}}),
    "gla_full": ("gla", {"gradient_accumulation_steps": 2}),
    "mamba2_packed": ("mamba2", {"packing": True, "batch_size": None, "tokens_per_batch": 64}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_stopped_twice_equals_one_that_was_not(case, tmp_path, bases, monkeypatch, capsys):
    family, changes = RESUMED[case]
    changes = from_base(bases, family) | changes
    whole = train(write_config(tmp_path, "whole", family, **changes))
    config = write_config(tmp_path, "stopped", family, **changes)
    for step, resume in ((1, False), (4, True)):
        with monkeypatch.context() as patch:
            stop_in_step(patch, step)
            part = train(config, resume=resume)
        assert part.outcome == "stopped" and part.exported is None
        assert step < part.steps < 8
    resumed = train(config, resume=True)
    assert resumed.outcome == whole.outcome == "finished"
    assert (resumed.best_step, resumed.after) == (whole.best_step, whole.after)
    assert_same_run(resumed.run_dir, whole.run_dir)
    assert "resuming from step-" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_skipped_and_said(tmp_path, bases, monkeypatch, capsys):
    changes = from_base(bases, "gla") | {"peft": LORA}
    whole = train(write_config(tmp_path, "whole", "gla", **changes))
    config = write_config(tmp_path, "stopped", "gla", **changes)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 5)
        part = train(config)
    newest = part.run_dir / "checkpoints" / f"step-{part.steps:08d}" / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    resumed = train(config, resume=True)
    said = capsys.readouterr().out
    assert f"skipped a damaged checkpoint: {newest.parent.name}" in said
    assert_same_run(resumed.run_dir, whole.run_dir)


def test_resume_refuses_another_run_and_names_what_changed(tmp_path, bases, capsys):
    changes = from_base(bases, "mamba") | {"peft": LORA}
    first = train(write_config(tmp_path, "run", "mamba", **changes))
    wider = write_config(tmp_path, "run", "mamba", **changes | {"group_by_length": False})
    with pytest.raises(InputError, match="--resume: group_by_length was True .* is False now"):
        train(wider, resume=True)
    kept = (first.run_dir / "cfg.yaml").read_text()
    assert "group_by_length: true" in kept
    train(write_config(tmp_path, "run", "mamba", **changes | {"save_total_limit": 3}), resume=True)
    assert "resumed with save_total_limit 3 instead of 2" in capsys.readouterr().out


def test_resume_begins_where_no_run_is_yet(tmp_path, bases, capsys):
    """A job that is submitted again has the same command the first time."""
    changes = from_base(bases, "mamba") | {"max_steps": 2, "skip_eval": True}
    first = train(write_config(tmp_path, "first", "mamba", **changes), resume=True)
    assert "--resume: no run is there yet, so this one begins" in capsys.readouterr().out
    plain = train(write_config(tmp_path, "plain", "mamba", **changes))
    assert_same_run(first.run_dir, plain.run_dir)


def test_a_step_larger_than_the_data(tmp_path, bases):
    changes = from_base(bases, "mamba") | {"max_steps": 2, "skip_eval": True, "batch_size": 100}
    assert train(write_config(tmp_path, "large", "mamba", **changes)).steps == 2


def test_resuming_a_finished_run_changes_nothing(tmp_path, bases):
    changes = from_base(bases, "mamba") | {
        "peft": LORA,
        "eval_at_start": True,
        "test_data": str(tmp_path / "test.jsonl"),
    }
    config = write_config(tmp_path, "done", "mamba", **changes)
    first = train(config)
    rows, tensors = metrics(first.run_dir), exported(first.run_dir)
    again = train(config, resume=True)
    assert metrics(again.run_dir) == rows and again.before == first.before
    assert again.test == first.test
    assert_same_tensors(exported(again.run_dir), tensors)


SIGNALLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_runs import stop_in_step
from ssm_train.cli import main

class Patch:
    setattr = staticmethod(setattr)

stop_in_step(Patch, 3)
sys.exit(main(["train", "--cfg", sys.argv[2]]))
"""


def test_sigusr1_exits_with_75_and_the_run_goes_on(tmp_path, bases):
    changes = from_base(bases, "gla") | {"peft": LORA}
    whole = train(write_config(tmp_path, "whole", "gla", **changes))
    config = write_config(tmp_path, "stopped", "gla", **changes)
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(Path(__file__).parent), str(config)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (REQUEUE, "")  # libraries keep quiet
    assert "go on with --resume" in done.stdout
    # A module imported for the first time may draw from Python's own generator; training does not.
    assert_same_run(train(config, resume=True).run_dir, whole.run_dir, unlike={"python"})


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_second_process_does_not_train_in_the_directory_of_a_run(flag, tmp_path, monkeypatch):
    """Also where neither asked for a lock."""
    config = write_config(tmp_path, "run", "mamba")
    run_dir = tmp_path / "output" / "train_seed42" / "run"
    refused = []

    def start_another(_):
        if run_dir.exists() and not refused:
            command = [sys.executable, "-m", "ssm_train", "train", "--cfg", str(config), flag]
            refused.append(subprocess.run(command, capture_output=True, text=True))

    monkeypatch.setattr("ssm_train.ready.show_batches", start_another)
    train(config)
    [done] = refused
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: lock: process {os.getpid()} owns {run_dir}; wait")
    assert len(losses(run_dir)) == 8
    assert not list(run_dir.parent.glob("*.lock"))


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("family", ["gla", "mamba", "mamba2"])
def test_packing_does_not_change_the_loss(family, tmp_path):
    """All examples in every step: as 24 padded rows, and one after the other in one row."""
    padded = write_config(tmp_path, "padded", family, batch_size=24, max_steps=4)
    packed = write_config(
        tmp_path, "packed", family, batch_size=None, max_steps=4, packing=True, tokens_per_batch=512
    )
    padded_run, packed_run = train(padded).run_dir, train(packed).run_dir
    assert losses(packed_run) == pytest.approx(losses(padded_run), abs=1e-5)
    assert losses(packed_run, "val") == pytest.approx(losses(padded_run, "val"), abs=1e-5)
    tokens = [row["tokens"] for row in metrics(padded_run, "train")]
    assert [row["tokens"] for row in metrics(packed_run, "train")] == tokens


def test_auto_records_a_number_that_a_resumed_run_keeps(tmp_path, monkeypatch, capsys):
    packed = {"packing": True, "batch_size": None, "peft": LORA}
    config = write_config(tmp_path, "auto", "mamba", tokens_per_batch="auto", **packed)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 1)
        stopped = train(config)
    assert "tokens_per_batch auto: 16,384 tokens, as the device is cpu" in capsys.readouterr().out
    assert stopped.outcome == "stopped"
    assert load_config(stopped.run_dir / "cfg.yaml")[0].tokens_per_batch == 16_384
    resumed = train(config, resume=True)
    said = capsys.readouterr().out
    assert "tokens_per_batch auto: 16,384 tokens, as the run began" in said
    assert "resuming from step-" in said
    plain = train(write_config(tmp_path, "plain", "mamba", **packed))
    assert_same_run(resumed.run_dir, plain.run_dir)

    number = write_config(tmp_path, "number", "mamba", tokens_per_batch=64, **packed)
    whole = train(number)
    small = write_config(tmp_path, "small", "mamba", tokens_per_batch=64, **packed)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        train(small)
    write_config(tmp_path, "small", "mamba", tokens_per_batch="auto", **packed)
    resumed = train(small, resume=True)
    assert load_config(resumed.run_dir / "cfg.yaml")[0].tokens_per_batch == 64
    assert_same_run(resumed.run_dir, whole.run_dir)


def test_a_base_with_auto_is_made_once(tmp_path):
    packed = {"packing": True, "batch_size": None, "max_steps": 2, "skip_eval": True}
    base = write_config(tmp_path, "base", "mamba", tokens_per_batch="auto", **packed)
    changes = {"new_model": None, "tokenizer": None, "model": str(base), "peft": LORA}
    config = write_config(tmp_path, "lora", "mamba", max_steps=2, skip_eval=True, **changes)
    train(config)
    weights = tmp_path / "output" / "train_seed42" / "base" / "model" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    train(config, overwrite=True)
    assert weights.stat().st_mtime_ns == made


def test_a_family_without_packing_is_refused(tmp_path):
    config = write_config(
        tmp_path, "packed", "bamba", packing=True, batch_size=None, tokens_per_batch=64
    )
    with pytest.raises(InputError, match="packing: bamba models cannot be packed"):
        train(config)
    assert not (tmp_path / "output").exists()


def test_a_family_that_cannot_recompute_is_refused(tmp_path, monkeypatch):
    traits = replace(BambaAdapter.traits, supports=frozenset())
    monkeypatch.setattr(BambaAdapter, "traits", traits)
    config = write_config(tmp_path, "run", "bamba", gradient_checkpointing=True)
    with pytest.raises(InputError, match="gradient_checkpointing: bamba models cannot recompute"):
        train(config)


def test_a_hybrid_trains(tmp_path):
    result = train(write_config(tmp_path, "bamba", "bamba", peft=LORA))
    seen = losses(result.run_dir)
    assert seen[-1] < seen[0]


# ---------------------------------------------------------------- what a run does


@pytest.mark.parametrize("peft", [None, LORA | {"lora_dropout": 0.0}], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["gla", "mamba"])
def test_learning_rate_zero_moves_nothing(family, peft, tmp_path, bases):
    config = write_config(
        tmp_path, "still", family, learning_rate=0.0, weight_decay=0.5, eval_at_start=True,
        peft=peft, eval_gen={"max_new_tokens": 8}, max_steps=3, **from_base(bases, family),
    )  # fmt: skip
    result = train(config)
    assert [row["step"] for row in metrics(result.run_dir, "val")] == [0, 3]
    assert result.before == result.after and "exact_match" in result.before
    tensors = exported(result.run_dir)
    if peft is None:
        assert_same_tensors(tensors, load_file(f"{bases(family)}/model.safetensors"))
    else:
        assert all(not tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_debug_max_steps_and_eval_steps(tmp_path):
    config = write_config(tmp_path, "debug", "mamba", peft=LORA, max_steps=50, debug=True)
    result = train(config)
    assert result.steps == 2  # 8 examples, 4 a batch
    config = write_config(tmp_path, "steps", "mamba", peft=LORA, max_steps=7, eval_steps=3)
    result = train(config)
    assert [row["step"] for row in metrics(result.run_dir, "val")] == [3, 6, 7]
    assert [row["step"] for row in metrics(result.run_dir, "train")] == [*range(1, 8)]


@pytest.fixture(scope="module")
def diverging(tmp_path_factory):
    """A run that is best in its first steps."""
    directory = tmp_path_factory.mktemp("diverging")
    config = write_config(
        directory, "diverging", "mamba", peft=LORA, eval_steps=1, max_steps=6, save_steps=2,
        learning_rate=3.0, lr_scheduler_type="constant", save_total_limit=1, overwrite=True,
    )  # fmt: skip
    return config, train(config)


def test_the_best_checkpoint_is_kept_and_exported(diverging):
    _, result = diverging
    seen = losses(result.run_dir, "val")
    assert result.best_step == seen.index(min(seen)) + 1 < 5
    names = sorted(path.name for path in (result.run_dir / "checkpoints").iterdir())
    assert names == ["best", "last", f"step-{result.best_step:08d}", "step-00000006"]
    best = load_file(
        result.run_dir / "checkpoints" / f"step-{result.best_step:08d}" / "trainable.safetensors"
    )
    written = {name.replace(".weight", ".default.weight"): t for name, t in
               exported(result.run_dir).items()}  # fmt: skip
    assert_same_tensors(written, best)

    def loss_of(checkpoint: str) -> float:
        values = evaluate_run(
            result.run_dir, data=None, split=None, checkpoint=checkpoint, device="cpu"
        )
        return values["loss"]

    assert loss_of("best") == pytest.approx(min(seen), abs=1e-6)
    assert loss_of("last") == pytest.approx(seen[-1], abs=1e-6)


def test_a_directory_in_use_is_refused_and_overwritten_on_request(diverging):
    config, result = diverging
    rows = metrics(result.run_dir)
    leftover = result.run_dir / "leftover"
    leftover.touch()
    with pytest.raises(InputError, match="already holds a run"):
        train(config, overwrite=False)
    assert leftover.exists()
    again = train(config)
    assert not leftover.exists() and metrics(again.run_dir) == rows


def test_a_metric_that_stays_too_low_ends_the_run(tmp_path):
    config = write_config(
        tmp_path, "low", "mamba", peft=LORA, task=SIDES, eval_steps=3, max_steps=30,
        min_eval_metric_after_epoch={1: 1.01},
    )  # fmt: skip
    result = train(config)
    assert (result.outcome, result.steps, result.main_metric) == ("low_metric", 6, "accuracy")
    assert result.exported and 0 <= result.after["accuracy"] <= 1


def test_a_base_from_a_run_config_is_trained_once(tmp_path):
    base = write_config(tmp_path, "base", "mamba", max_steps=2, skip_eval=True)
    changes = {"new_model": None, "tokenizer": None, "model": str(base), "peft": LORA}
    config = write_config(tmp_path, "lora", "mamba", **changes, overwrite=True, max_steps=2)
    result = train(config)
    rows, tensors = metrics(result.run_dir), exported(result.run_dir)
    weights = tmp_path / "output" / "train_seed42" / "base" / "model" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    train(config)
    assert weights.stat().st_mtime_ns == made
    assert metrics(result.run_dir) == rows
    assert_same_tensors(exported(result.run_dir), tensors)
    write_config(tmp_path, "base", "mamba", max_steps=2, skip_eval=True, device="auto", lock=True)
    train(config)
    assert weights.stat().st_mtime_ns == made
    write_config(tmp_path, "base", "mamba", max_steps=3, skip_eval=True)
    with pytest.raises(InputError, match=f"max_steps from the base in {weights.parents[1]}; give"):
        train(config)
    assert weights.stat().st_mtime_ns == made
    assert_same_tensors(exported(result.run_dir), tensors)


def test_a_debug_base_is_the_same_base_the_next_time(tmp_path):
    base = write_config(tmp_path, "base", "mamba", batch_size=16, skip_eval=True, debug=True)
    changes = {"new_model": None, "tokenizer": None, "model": str(base), "max_steps": 1}
    weights = tmp_path / "output" / "train_seed42" / "base" / "model" / "model.safetensors"
    made = set()
    for name in ("first", "second"):
        train(write_config(tmp_path, name, "mamba", **changes))
        made.add(weights.stat().st_mtime_ns)
    assert len(made) == 1


def test_a_run_on_a_base_works_from_anywhere_until_its_weights_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = Path()
    write_config(here, "base", "mamba", max_steps=2, skip_eval=True, output_root=None)
    changes = {"new_model": None, "tokenizer": None, "model": "base.yaml", "peft": LORA}
    config = write_config(here, "lora", "mamba", **changes, max_steps=2, output_root=None)
    monkeypatch.setenv("SSM_TRAIN_OUTPUT", "elsewhere")
    result = train(config, output_root="elsewhere")
    weights = tmp_path / "elsewhere" / "train_seed42" / "base" / "model" / "model.safetensors"
    assert weights.is_file()
    record = json.loads((result.run_dir / "base.json").read_text())
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record == {"directory": str(weights.parent), "sha256": {weights.name: sha256}}

    run_dir = result.run_dir.resolve()
    (tmp_path / "base.yaml").rename(tmp_path / "other.yaml")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    for checkpoint in ("best", "last"):
        load_run(run_dir, checkpoint, "cpu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").rename(tmp_path / "base.yaml")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="model.safetensors in .* has SHA-256"):
        load_run(run_dir, "best", "cpu")
    with pytest.raises(InputError, match="put those weights back"):
        train(config, output_root="elsewhere", resume=True)


WAITING = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny_runs import train
train(Path(sys.argv[2]))
"""


def test_two_runs_make_their_base_once(tmp_path):
    base = write_config(tmp_path, "base", "mamba", max_steps=2, skip_eval=True)
    base_dir = tmp_path / "output" / "train_seed42" / "base"
    changes = {"new_model": None, "tokenizer": None, "model": str(base), "peft": LORA}
    first = write_config(tmp_path, "first", "mamba", **changes, max_steps=2)
    second = write_config(tmp_path, "second", "mamba", **changes, max_steps=2)
    with own(base_dir):  # as a run that trains the base
        waiting = subprocess.Popen(
            [sys.executable, "-c", WAITING, str(Path(__file__).parent), str(second)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert waiting.stdout.readline().startswith(f"waiting for the base {base_dir}")
        assert not base_dir.exists()
        train(base)
        made = (base_dir / "model" / "model.safetensors").stat().st_mtime_ns
    said = waiting.communicate()[0]
    assert waiting.returncode == 0 and "waiting" not in said and "second" in said
    train(first)
    assert (base_dir / "model" / "model.safetensors").stat().st_mtime_ns == made


@pytest.mark.parametrize("peft", [None, LORA], ids=["model", "adapter"])
def test_an_export_that_was_cut_short_is_no_export(peft, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    config = write_config(tmp_path, "cut", "mamba", max_steps=2, skip_eval=True, peft=peft)
    save = PreTrainedTokenizerBase.save_pretrained

    def killed(self, directory, *args, **kwargs):
        if Path(directory).name.startswith(("model", "adapter")):
            raise KeyboardInterrupt
        return save(self, directory, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    run_dir = tmp_path / "output" / "train_seed42" / "cut"
    kind = "model" if peft is None else "adapter"
    assert not (run_dir / kind).exists()
    for _ in range(2):  # the second time there is an export to replace
        assert train(config, resume=True).exported == run_dir / kind
    assert [path.name for path in run_dir.glob(f"{kind}*")] == [kind]
    load_run(run_dir, "best", "cpu")


def test_a_base_that_was_stopped_goes_on(tmp_path, monkeypatch):
    base = write_config(tmp_path, "base", "mamba", max_steps=6, skip_eval=True)
    changes = {"new_model": None, "tokenizer": None, "model": str(base), "peft": LORA}
    config = write_config(tmp_path, "lora", "mamba", **changes, max_steps=2)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        stopped = train(config)
    assert (stopped.outcome, stopped.run_dir.name) == ("stopped", "base") and stopped.steps < 6
    assert not (stopped.run_dir.parent / "lora").exists()
    assert train(config).outcome == "finished"
    whole = train(write_config(tmp_path, "whole", "mamba", max_steps=6, skip_eval=True))
    assert_same_run(stopped.run_dir, whole.run_dir)


def test_a_matrix_past_which_the_forward_reads_stops_the_run(tmp_path, monkeypatch, capsys):
    import torch.nn.functional as F

    from ssm_train.adapters.gla_mixer import GatedMLP
    from ssm_train.cli import main
    from ssm_train.commands import BAD_INPUT

    def fused(self, x, **_):
        return F.linear(F.silu(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    monkeypatch.setattr(GatedMLP, "forward", fused)
    config = write_config(tmp_path, "dead", "gla", peft=LORA)
    assert main(["train", "--cfg", str(config)]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "mlp.down_proj (lora_A, lora_B)" in error
    assert not (tmp_path / "output").exists()


def test_ten_bad_losses_end_the_run_without_an_export(tmp_path, monkeypatch):
    from ssm_train.adapters.mamba import MAMBA, MambaAdapter

    original, calls = MambaAdapter.token_losses, []

    def broken(self, model, batch):
        calls.append(1)
        result = original(model, batch)
        result.loss = result.loss * (1.0 if len(calls) == 1 else math.nan)  # the preflight passes
        return result

    monkeypatch.setattr(type(MAMBA), "token_losses", broken)
    result = train(write_config(tmp_path, "bad", "mamba", max_steps=20, skip_eval=True))
    assert (result.outcome, result.steps, result.exported) == ("bad_loss", 10, None)


# ---------------------------------------------------------------- precision

ISLANDS = {
    "mamba": ("ssm_train.adapters.mamba_mixer.MambaMixer", ("A_log", "D", "dt_proj.bias")),
    "mamba2": ("ssm_train.adapters.mamba_mixer.Mamba2Mixer", ("A_log", "D", "dt_bias")),
    "gla": ("ssm_train.adapters.gla_mixer.GatedLinearAttention", ("gk_proj.1.bias",)),
}


@pytest.mark.parametrize("family", ISLANDS)
def test_bf16_stores_frozen_weights_and_keeps_islands(family, tmp_path, monkeypatch, bases):
    import importlib

    changes = from_base(bases, family) | {"peft": LORA, "prec": "bf16", "batch_size": 24}
    path, names = ISLANDS[family]
    module, _, name = path.rpartition(".")
    mixer = getattr(importlib.import_module(module), name)
    forward, seen = mixer.forward, set()

    def recording(self, *args, **kwargs):
        for key, parameter in self.named_parameters():
            key = key.replace(".base_layer", "")
            kind = "island" if key in names else "factor" if "lora_" in key else "matrix"
            if parameter.dim() == 2 or kind == "island":
                seen.add((kind, key if kind == "island" else "", parameter.dtype))
        seen.add(("autocast", "", torch.get_autocast_dtype("cpu")))
        assert torch.is_autocast_enabled("cpu")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(mixer, "forward", recording)
    result = train(write_config(tmp_path, "half", family, **changes))
    half, full = torch.bfloat16, torch.float32
    assert seen == {
        *(("island", name, full) for name in names),
        ("factor", "", full),
        ("matrix", "", half),
        ("autocast", "", half),
    }
    assert all(tensor.dtype == full for tensor in exported(result.run_dir).values())
    seen_losses = losses(result.run_dir)
    assert seen_losses[-1] < seen_losses[0]


# ---------------------------------------------------------------- trackers


def test_tensorboard_gets_the_rows_of_metrics_jsonl(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = write_config(tmp_path, "seen", "mamba", peft=LORA, trackers=["tensorboard"])
    result = train(config)
    reader = EventAccumulator(str(result.run_dir / "tensorboard" / "seen"))
    reader.Reload()
    for split in ("train", "val"):
        written = [(event.step, event.value) for event in reader.Scalars(f"{split}/loss")]
        rows = [(row["step"], row["loss"]) for row in metrics(result.run_dir, split)]
        assert [step for step, _ in written] == [step for step, _ in rows]
        assert [v for _, v in written] == pytest.approx([v for _, v in rows], rel=1e-6)


def test_a_base_from_files_trains_in_training_mode(tmp_path, monkeypatch):
    """transformers loads in evaluation mode, in which nothing is recomputed and nothing dropped."""
    base = write_config(tmp_path, "base", "gla", max_steps=1, skip_eval=True)
    config = write_config(
        tmp_path, "run", "gla", new_model=None, tokenizer=None, model=str(base), peft=LORA,
        max_steps=4, eval_steps=2, gradient_checkpointing=True,
    )  # fmt: skip
    modes = []

    def spy(run, step):
        modes.append({module.training for module in run.engine.model.modules()})
        return train_step(run, step)

    monkeypatch.setattr("ssm_train.loop.train_step", spy)
    train(config)
    assert modes == [{True}] * 5  # one step of the base, four of the run, evaluations between
