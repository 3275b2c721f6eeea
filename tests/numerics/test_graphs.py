"""Batches padded for CUDA graphs mean the same, and a run with graphs is the run without."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ssm_train import distributed
from ssm_train import graphs as graphs_module
from ssm_train.adapters import registry
from ssm_train.adapters.base import Batch, ModelSpec
from ssm_train.data.batches import pack
from ssm_train.data.tasks.quickstart import QUICKSTART
from ssm_train.data.tokens import Chunk, TokenizedDataset
from ssm_train.engines.replicated import Replicated
from ssm_train.graphs import IGNORED, obstacle, pad
from ssm_train.loop import Training, TrainState, train
from ssm_train.optim import OptimSettings, build_optimizer
from ssm_train.peft.spec import load_peft
from ssm_train.recording import NotRecorded
from ssm_train.schedule import Schedule

VOCABULARY = 61
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY}
MODELS: dict[str, dict[str, Any]] = {
    "gla": {"model_type": "gla", "hidden_size": 64, "num_heads": 2, "intermediate_size": 96},
    "mamba": {"model_type": "mamba", "hidden_size": 32, "state_size": 8, "time_step_rank": 8},
    "mamba2": {
        "model_type": "mamba2", "hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1,
        "state_size": 16,
    },
}  # fmt: skip
ROW = 256


def packed_batches(count: int) -> list[Batch]:
    """Rows of documents of other lengths and another number in each."""
    draw = np.random.default_rng(0)
    batches = []
    for _ in range(count):
        lengths = draw.integers(3, 40, int(draw.integers(4, 9)))
        chunk = Chunk(
            ids=draw.integers(3, VOCABULARY, lengths.sum()).astype(np.int32),
            learnt=np.concatenate([np.arange(n) >= n // 2 for n in lengths]),
            lengths=lengths,
            prompt_lengths=lengths // 2,
        )
        data = TokenizedDataset(QUICKSTART, "test", [chunk], pad_id=0, eos_id=2)
        batches.append(pack(data, np.arange(len(lengths)), ROW))
    return batches


def training(family: str, device: str, batches: list[Batch], graphs: bool, **settings: Any) -> Any:
    prec = "bf16" if device == "cuda" else "fp32"
    engine = Replicated(distributed.build_accelerator(prec, device))
    torch.manual_seed(0)
    config = MODELS[family] | SPECIAL | {"num_hidden_layers": 2}
    spec = ModelSpec(
        new_model=config, device=device,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
    )  # fmt: skip
    adapter, _ = registry.resolve(spec)
    prepared = adapter.prepare(spec)
    peft = load_peft({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings)
    assert peft is not None
    peft.make().inject(prepared)
    optim = OptimSettings(learning_rate=1e-2, lr_scheduler_type="constant")
    no_decay = prepared.traits.no_decay
    engine.prepare(prepared.model, lambda model: build_optimizer(model, optim, no_decay))
    rows: list[dict[str, float]] = []
    run = Training(
        engine=engine, token_losses=adapter.token_losses,
        micro_batches=lambda step: batches[2 * step : 2 * step + 2],
        schedule=Schedule(len(batches) // 2, 10_000, 10_000, 1, 10_000, 10_000), optim=optim,
        prec=prec, log=rows.append, evaluate=None, save=None,
        cuda_graphs=graphs,
    )  # fmt: skip
    engine.model.train()
    return run, rows


@pytest.mark.parametrize("family", MODELS)
def test_a_padded_batch_has_the_same_gradients(family: str) -> None:
    (batch,) = packed_batches(1)
    padded = pad(batch)
    assert padded.cu_seqlens is not None
    assert padded.cu_seqlens.numel() == 33 and padded.targets.numel() % 32 == 0
    assert int((padded.targets == IGNORED).sum()) == padded.targets.numel() - batch.targets.numel()
    run, _ = training(family, "cpu", [batch], graphs=False)
    results = []
    for given in (batch, padded):
        run.engine.model.zero_grad()
        loss = run.gradients(given, torch.tensor(1.0))
        results.append([loss, *(p.grad.clone() for p in run.parameters)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", MODELS)
def test_a_run_with_graphs_is_the_run_without(family: str) -> None:
    batches = 8 * packed_batches(4)  # the same ones again, so that there is something to learn
    losses = {}
    for graphs in (False, True):
        run, rows = training(family, "cuda", batches, graphs)
        assert train(run, TrainState()) == "finished"
        losses[graphs] = torch.tensor([row["loss"] for row in rows])
        if graphs:
            recorded = run.gradients.recorded.values()
            assert sum(recording is not None for recording in recorded) >= 1
    assert losses[True][-1] < losses[True][0] - 0.1, "nothing was learnt"
    torch.testing.assert_close(losses[True], losses[False], rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_differs_from_replay_to_replay() -> None:
    batch = packed_batches(1)[0].to("cuda")
    run, _ = training("gla", "cuda", [batch], graphs=True, lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in run.engine.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    losses = {float(run.gradients(batch, torch.ones((), device="cuda"))) for _ in range(5)}
    assert len(losses) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_wait_for_the_device_ends_recording_and_nothing_else() -> None:
    batch = packed_batches(1)[0].to("cuda")
    run, _ = training("gla", "cuda", [batch], graphs=True, lora_dropout=0.5)

    def wait(*_: Any) -> None:
        torch.cuda.synchronize()

    run.engine.model.register_forward_pre_hook(wait)
    one, stream = torch.ones((), device="cuda"), torch.cuda.current_stream()
    run.gradients(batch, one)
    with pytest.warns(UserWarning, match="no CUDA graphs"):
        run.gradients(batch, one)
    assert torch.cuda.current_stream() == stream
    losses = {float(run.gradients(batch, one)) for _ in range(3)}
    assert all(map(math.isfinite, losses))


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise NotRecorded("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs_module, "Recording", refuse)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    (batch,) = packed_batches(1)
    run, _ = training("gla", "cpu", [batch], graphs=True)
    one = torch.tensor(1.0)
    first = run.gradients(batch, one)
    gradients = [p.grad.clone() for p in run.parameters]
    with pytest.warns(UserWarning, match="one by one: operation not permitted"):
        second = run.gradients(batch, one)
    assert run.gradients(batch, one) == first == second
    for parameter, gradient in zip(run.parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * gradient)


def test_obstacles_are_said() -> None:
    cuda = torch.device("cuda")
    assert obstacle(cuda, True, "bf16", False) is None
    for given, part in (
        ((torch.device("cpu"), True, "bf16", False), "cpu"),
        ((cuda, False, "bf16", False), "packing"),
        ((cuda, True, "fp16", False), "fp16"),
        ((cuda, True, "bf16", True), "gradient_checkpointing"),
    ):
        assert part in str(obstacle(*given))
