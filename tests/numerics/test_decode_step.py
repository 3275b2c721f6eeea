"""Decoding through the static step is decoding as transformers does it, and so is its graph."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from ssm_train import decode_step
from ssm_train.adapters import registry
from ssm_train.adapters.base import ModelSpec
from ssm_train.decode_step import DecodingStep, decoding_steps
from ssm_train.generate import (
    Decoder,
    evaluation_mode,
    language_model,
    pad_left,
    read_options,
)
from ssm_train.peft.spec import load_peft
from ssm_train.recording import NotRecorded

VOCABULARY = 61
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY}
GLA = {"model_type": "gla", "hidden_size": 64, "num_heads": 2, "intermediate_size": 96}
MODELS: dict[str, dict[str, Any]] = {
    "gla": GLA,
    "gla with convolutions": GLA | {"use_short_conv": True},
    "mamba": {"model_type": "mamba", "hidden_size": 32, "state_size": 8, "time_step_rank": 8},
    "mamba2": {
        "model_type": "mamba2", "hidden_size": 32, "num_heads": 4, "head_dim": 16, "n_groups": 1,
        "state_size": 16,
    },
    "bamba": {
        "model_type": "bamba", "hidden_size": 32, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_n_groups": 1, "mamba_d_state": 16, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 48, "attn_layer_indices": [1],
    },
}  # fmt: skip
STEPPED = [family for family in MODELS if family != "bamba"]
NONE: dict[str, Any] = {}


def make_model(
    family: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **peft: Any
) -> torch.nn.Module:
    """With LoRA on all projections, or another method, whose parameters are far from the start."""
    torch.manual_seed(3)
    config = MODELS[family] | SPECIAL | {"num_hidden_layers": 2, "initializer_range": 0.4}
    spec = ModelSpec(new_model=config, device=device, dtype=dtype)
    adapter, _ = registry.resolve(spec)
    prepared = adapter.prepare(spec)
    method = load_peft(peft or {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    assert method is not None
    method.make().inject(prepared)
    with torch.no_grad():
        for parameter in prepared.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))
    return prepared.model


def prompts(lengths: list[int]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]


PROMPTS = prompts([9, 1, 4, 7, 2, 4, 5])  # batches of 3, 3 and 1


def decode(
    model: Any,
    steps: Any,
    options: Mapping[str, Any],
    given: list[list[int]] = PROMPTS,
    **changes: Any,
) -> list[list[int]]:
    settings: dict[str, Any] = {
        "eos_token_id": 2, "pad_token_id": 0, "batch_size": 3, "autocast": nullcontext,
        "steps": steps,
    }  # fmt: skip
    torch.manual_seed(7)  # for drawn tokens
    decoder = Decoder(read_options({"max_new_tokens": 8, **options}), **settings | changes)
    return decoder(model, given)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of a step."""
    rows: list[int] = []
    call = DecodingStep.__call__

    def count(self: DecodingStep, ids: torch.Tensor, *args: Any) -> Any:
        rows.append(len(ids))
        return call(self, ids, *args)

    monkeypatch.setattr(DecodingStep, "__call__", count)
    return rows


@pytest.mark.parametrize("family", STEPPED)
@pytest.mark.parametrize(
    "options",
    [
        NONE,
        {"min_length": 8},
        {"num_beams": 3, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 1.5, "top_p": 0.9},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    ],
    ids=lambda options: " ".join(options) or "greedy",
)
def test_answers_are_those_of_transformers(
    family: str, options: dict[str, Any], counted: list[int]
) -> None:
    model = make_model(family)
    eos = decode(model, "eager", options | {"min_new_tokens": 8})[0][
        4
    ]  # some answers will end with it
    expected = decode(model, "eager", options, eos_token_id=eos)
    assert len(set(map(len, expected))) > 1, "all answers have one length"
    assert not counted
    assert decode(model, "static", options, eos_token_id=eos) == expected
    assert "forward" not in vars(language_model(model))
    one_length = {"min_length", "repetition_penalty"} & set(options)  # prompts of a batch
    few, many = (1, 2) if one_length else (1, 3)
    beams = options.get("num_beams", 1)
    assert set(counted) >= {few * beams, many * beams}
    counted.clear()
    assert decode(model, "eager", options, eos_token_id=eos) == expected
    assert not counted


def test_attention_stays_with_transformers(counted: list[int]) -> None:
    model = make_model("bamba")
    assert decode(model, "static", NONE) == decode(model, "eager", NONE)
    assert not counted


@pytest.mark.parametrize("family", STEPPED)
@pytest.mark.parametrize("rows", [3, 8], ids=["full", "padded"])
def test_logits_are_those_of_transformers(family: str, rows: int) -> None:
    model = make_model(family)
    ids, mask = pad_left(PROMPTS[:3], 0)
    options: dict[str, Any] = {
        "input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20,
        "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    inner: Any = model
    with evaluation_mode(model):
        expected = inner.generate(**options)
        with decoding_steps(language_model(model), rows, record=False):
            found = [inner.generate(**options) for _ in range(2)]  # where the first left its states
    logits = torch.stack(expected.logits)
    for ours in found:
        assert torch.equal(ours.sequences, expected.sequences)
        error = (torch.stack(ours.logits) - logits).abs().max() / logits.abs().max()
        assert error < 1e-5


@pytest.mark.parametrize("family", STEPPED)
def test_steps_end_with_the_last_answer(family: str, counted: list[int]) -> None:
    model = make_model(family)
    (answer,) = decode(model, "eager", NONE, given=PROMPTS[:1])
    eos = answer[4]
    steps = answer.index(eos)  # the prompt's forward gives the first token
    assert decode(model, "static", NONE, given=PROMPTS[:1], eos_token_id=eos) == [answer[:steps]]
    assert len(counted) == steps


@pytest.mark.parametrize(
    ("family", "peft"),
    [
        ("mamba", {"peft_type": "AFFIX_TUNING"}),
        ("mamba", {"peft_type": "STATE_OFFSET_TUNING"}),
        ("mamba", {"peft_type": "ADDITIONAL_SCAN"}),
        ("mamba2", {"peft_type": "SSMPEFT", "scan": {"type": "init_state"}}),
        ("gla", {"peft_type": "LORA", "r": 4, "use_dora": True}),
    ],
    ids=str,
)
def test_other_methods_too(family: str, peft: dict[str, Any], counted: list[int]) -> None:
    model = make_model(family, **peft)
    assert decode(model, "static", NONE) == decode(model, "eager", NONE)
    assert counted


def test_states_lie_in_memory_as_those_given() -> None:
    state = torch.randn(2, 4, 3).mT
    wide = decode_step.widen(state, 5)
    assert wide.shape == (5, 3, 4) and wide.stride()[1:] == state.stride()[1:]
    assert wide.mT.is_contiguous() and not wide.any()


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotRecorded("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_step, "record", refuse)
    monkeypatch.setattr(decode_step, "recording_stream", lambda device: None)
    monkeypatch.setattr(DecodingStep, "_run_aside", DecodingStep._run)
    monkeypatch.setattr(
        Decoder,
        "stepping",
        lambda self, model, rows: decoding_steps(language_model(model), rows, record=True),
    )
    model = make_model("gla")
    with pytest.warns(UserWarning, match="one by one: operation not permitted when stream is cap"):
        found = decode(model, "auto", NONE)
    monkeypatch.undo()
    assert found == decode(model, "eager", NONE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", STEPPED)
@pytest.mark.parametrize("options", [NONE, {"num_beams": 3}], ids=["greedy", "beams"])
def test_the_graph_is_the_step(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[Any] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), replay(self))[1]
    )
    model = make_model(family, "cuda", torch.float32)
    expected = decode(model, "eager", options)
    assert not replays
    assert decode(model, "auto", options) == expected
    assert len(set(map(id, replays))) == 1 and len(replays) > 3
    before = len(replays)
    with torch.no_grad():  # another model: what was recorded before is not used
        for parameter in model.parameters():
            parameter.mul_(1.02)
    autocast = partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    changed = decode(model, "static", options, autocast=autocast)
    assert len(replays) == before
    assert decode(model, "auto", options, autocast=autocast) == changed
    assert len(replays) > before
