"""Whole runs of SD_LORA and GLA_SD_LORA: two stages, the choice between them and its record, and
runs that stop in either stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    assert_same_run,
    assert_same_tensors,
    exported,
    losses,
    metrics,
    stop_in_step,
    train,
    write_config,
)

import ssm_train
from ssm_train.cli import main
from ssm_train.errors import InputError
from ssm_train.peft.sd_lora import SdLoraMethod

SPARSE: dict[str, dict[str, Any]] = {
    "mamba": {
        "peft_type": "SD_LORA",
        "num_freeze": {"channel": 0.9, "state": 0.75},
        "proj_lora_r": 2,
        "num_warmup_it": 4,
    },
    "gla": {"peft_type": "GLA_SD_LORA", "proj_lora_r": 2, "num_warmup_it": 4},
}
SCORED = {"mamba": "backbone.layers.0.mixer", "gla": "model.layers.0.attn"}
# family -> channels of the tiny model; those that train; those that are zeroed
COUNTS = {"mamba": (64, 6, 0), "gla": (16, 6, 2)}


@pytest.fixture(scope="module", params=SPARSE)
def finished(request, tmp_path_factory):
    """(family, directory, result of an uninterrupted run)."""
    family = request.param
    directory = tmp_path_factory.mktemp(family)
    config = write_config(directory, "whole", family, peft=SPARSE[family], seed=3)
    return family, directory, train(config)


def test_both_stages_are_trained_logged_and_evaluated(finished):
    family, _, result = finished
    assert result.outcome == "finished" and result.steps == 8
    warmup = result.run_dir / "warmup"
    assert [row["step"] for row in metrics(warmup, "train")] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in metrics(warmup, "val")] == [4, 5]
    assert [row["step"] for row in metrics(result.run_dir, "train")] == list(range(1, 9))
    assert json.loads((result.run_dir / "result.json").read_text())["stage"] == "train"
    state = json.loads((warmup / "checkpoints/step-00000005/state.json").read_text())
    assert state["stage"] == "warmup"


def test_the_warm_up_follows_the_run_s_learning_rate_and_data(finished):
    _, _, result = finished
    first = metrics(result.run_dir / "warmup", "train")
    second = metrics(result.run_dir, "train")
    for key in ("learning_rate", "tokens"):
        assert [row[key] for row in first] == [row[key] for row in second[:5]]


def test_the_choice_is_recorded(finished):
    family, _, result = finished
    tensors = load_file(result.run_dir / "selection.safetensors")
    record = json.loads((result.run_dir / "selection.json").read_text())
    mixer, (size, trained, zeroed) = SCORED[family], COUNTS[family]
    assert list(record["layers"]) == [mixer]
    assert tensors[f"{mixer}.score"].shape == (size,)
    channels = record["layers"][mixer]["channels"]
    assert len(channels) == trained == len(set(channels)) and channels == sorted(channels)
    assert len(record["layers"][mixer]["zeroed"]) == zeroed
    assert tensors[f"{mixer}.channels"].tolist() == channels
    assert (result.run_dir / "selection.png").read_bytes()[:4] == b"\x89PNG"
    # The channels are those that the warm-up's last checkpoint moved most.
    last = load_file(result.run_dir / "warmup/checkpoints/step-00000005/trainable.safetensors")
    (dense,) = [tensor for name, tensor in last.items() if name.endswith("dense")]
    score = dense.square().sum(1)
    torch.testing.assert_close(tensors[f"{mixer}.score"], score)
    assert set(score.topk(trained).indices.tolist()) == set(channels)
    if zeroed:
        least = (-score).topk(zeroed).indices.tolist()
        assert set(least) == set(record["layers"][mixer]["zeroed"])
    if family == "mamba":
        states = torch.tensor(record["layers"][mixer]["states"])
        expected = dense[channels].square().topk(1, dim=1).indices
        assert torch.equal(states, expected)


def test_the_count_is_that_of_the_second_stage(finished):
    family, _, result = finished
    tensors = exported(result.run_dir)
    values = {name: tensor for name, tensor in tensors.items() if "_values." in name}
    assert result.trainable == sum(tensor.numel() for tensor in values.values())
    assert not any("dense" in name for name in tensors)
    if family == "mamba":  # 6 channels x 1 of 4 states; B and C: 4 rows each of 6 columns
        cells = sum(t.numel() for name, t in values.items() if name.endswith("cells"))
        assert cells == 6 * 1 + 2 * 4 * 6


def test_the_second_stage_starts_from_the_pretrained_weights(tmp_path):
    """Its first loss is that of the base, which an adapter that starts at zero has too."""
    sparse = train(write_config(tmp_path, "sparse", "mamba", peft=SPARSE["mamba"]))
    plain = train(
        write_config(tmp_path, "plain", "mamba", peft={"peft_type": "BITFIT"}, max_steps=1)
    )
    assert losses(sparse.run_dir)[0] == pytest.approx(losses(plain.run_dir)[0], abs=1e-6)
    assert losses(sparse.run_dir / "warmup")[0] == pytest.approx(losses(plain.run_dir)[0], abs=1e-6)


def test_runs_stopped_in_both_stages_equal_one_that_was_not(finished, monkeypatch):
    family, directory, whole = finished
    config = write_config(directory, "stopped", family, peft=SPARSE[family], seed=3)
    stop_in_step(monkeypatch, 2)
    first = train(config)
    assert (first.outcome, first.stage, first.steps) == ("stopped", "warmup", 3)
    stop_in_step(monkeypatch, 6)
    second = train(config, resume=True)
    assert (second.outcome, second.stage, second.steps) == ("stopped", "train", 7)
    third = train(config, resume=True)
    assert third.outcome == "finished"
    assert_same_run(third.run_dir, whole.run_dir)
    assert metrics(third.run_dir / "warmup") == metrics(whole.run_dir / "warmup")
    assert_same_tensors(*(load_file(r.run_dir / "selection.safetensors") for r in (third, whole)))


def test_a_request_to_stop_in_the_last_step_of_the_warm_up_is_kept(finished, monkeypatch):
    family, directory, whole = finished
    config = write_config(directory, "late", family, peft=SPARSE[family], seed=3)
    stop_in_step(monkeypatch, 4)
    first = train(config)
    assert (first.outcome, first.stage, first.steps) == ("stopped", "warmup", 5)
    second = train(config, resume=True)
    assert_same_run(second.run_dir, whole.run_dir)


def test_a_run_stopped_in_its_warm_up_seen_from_outside(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, "early", "mamba", peft=SPARSE["mamba"])
    stop_in_step(monkeypatch, 1)
    run_dir = train(config).run_dir
    with pytest.raises(InputError, match="stopped in its warm-up, .*; go on with --resume"):
        ssm_train.load_run(run_dir)
    assert main(["plot", str(run_dir), "--out", str(tmp_path / "plot.png")]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "output")]) == 0
    assert "stopped in its warm-up (step 2)" in capsys.readouterr().out


def test_damage_in_the_second_stage_is_said_where_the_warm_up_goes_on(tmp_path, capsys):
    config = write_config(tmp_path, "damaged", "mamba", peft=SPARSE["mamba"])
    first = train(config)
    for path in (first.run_dir / "checkpoints").glob("step-*/state.json"):
        path.write_text("{}")
    capsys.readouterr()
    assert train(config, resume=True).outcome == "finished"
    said = capsys.readouterr().out
    assert "skipped a damaged checkpoint: step-00000008: state.json" in said
    assert "warm-up: resuming from step-00000005" in said
    assert "chose 6 of 64 channels in 1 layer, 1 states in each; 0 zeroed" in said


def test_a_debug_run_has_a_warm_up_of_one_step(tmp_path):
    config = write_config(tmp_path, "debug", "mamba", peft=SPARSE["mamba"])
    result = train(config, debug=True)
    assert result.outcome == "finished"
    assert len(metrics(result.run_dir / "warmup", "train")) == 1


def test_a_warm_up_at_a_rate_of_zero_is_refused_before_it(tmp_path):
    peft = SPARSE["mamba"] | {"num_warmup_it": 0}
    config = write_config(tmp_path, "still", "mamba", peft=peft, warmup_steps=2)
    with pytest.raises(InputError, match="num_warmup_it 0: the learning rate of the only step"):
        train(config)


def test_what_a_run_wrote_is_a_config_again(finished, tmp_path):
    from ssm_train.peft.spec import load_peft

    family, _, result = finished
    record = json.loads((result.run_dir / "selection.json").read_text())["settings"]
    written = load_peft(record | {"peft_type": SPARSE[family]["peft_type"]})
    assert written is not None and written.dump() == load_peft(SPARSE[family]).dump()
    exported = load_peft(result.run_dir / "adapter" / "adapter_config.json")
    assert exported is not None and exported.dump() == written.dump()


def test_a_run_that_dies_between_the_stages_goes_on(finished, monkeypatch):
    family, directory, whole = finished
    config = write_config(directory, "died", family, peft=SPARSE[family], seed=3)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SdLoraMethod, "select", die)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    result = train(config, resume=True)
    assert result.outcome == "finished"
    assert_same_run(result.run_dir, whole.run_dir)


def test_the_exported_adapter_is_the_trained_model(finished):
    family, _, result = finished
    model, tokenizer = ssm_train.load_run(result.run_dir)
    ids = torch.tensor([[5, 9, 7, 6, 8, 11]])
    before = model(input_ids=ids).logits
    again, _ = ssm_train.load_run(result.run_dir, checkpoint=str(result.best_step))
    assert torch.equal(again(input_ids=ids).logits, before)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-4)


def test_a_warm_up_longer_than_the_run_is_refused_before_it(tmp_path):
    peft = SPARSE["mamba"] | {"num_warmup_it": 8}
    config = write_config(tmp_path, "long", "mamba", peft=peft)
    with pytest.raises(InputError, match="num_warmup_it 8: a warm-up of 9 .* the run of 8; lower"):
        train(config)
    assert not (tmp_path / "output").exists()


def test_the_old_variables_change_it(tmp_path):
    from ssm_train.config import load_config
    from ssm_train.train import run

    config = write_config(tmp_path, "variables", "mamba", peft=SPARSE["mamba"])
    variables = {"HP_WARMUP_IT": "1", "HP_FREEZE_RATIO": "0.5", "HP_TRAIN_RATIO": "0.25"}
    cfg, provenance = load_config(config, environment=variables)
    result = run(cfg, provenance, config)
    assert len(metrics(result.run_dir / "warmup", "train")) == 2
    layer = json.loads((result.run_dir / "selection.json").read_text())["layers"][SCORED["mamba"]]
    assert (len(layer["channels"]), len(layer["zeroed"])) == (16, 16)
    merged = tmp_path / "merged"

    assert main(["merge", str(result.run_dir), "--out", str(merged)]) == 0
    A_log = load_file(Path(merged) / "model.safetensors")["backbone.layers.0.mixer.A_log"]
    forgotten = (A_log > 60).all(1).nonzero().flatten().tolist()
    assert forgotten == layer["zeroed"]
