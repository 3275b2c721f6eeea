"""Mamba-1 and Mamba-2 against transformers' own models, and against themselves: padded, packed,
cached, checkpointed, adapted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mamba2ForCausalLM, MambaForCausalLM

from ssm_train.adapters import common, mamba, mamba_mixer, modules
from ssm_train.adapters.base import Batch, ModelSpec
from ssm_train.adapters.registry import adopt

FAMILIES = ("mamba", "mamba2")
VARIANTS = [
    ("mamba", {}),
    ("mamba", {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}),
    ("mamba", {"tie_word_embeddings": False, "residual_in_fp32": False, "time_step_rank": 5}),
    ("mamba", {"conv_kernel": 2, "hidden_act": "gelu", "state_size": 3}),
    ("mamba2", {}),
    ("mamba2", {"use_bias": True, "use_conv_bias": False, "n_groups": 3, "chunk_size": 4}),
    ("mamba2", {"tie_word_embeddings": True, "n_groups": 1, "time_step_limit": (0.3, 0.9)}),
    ("mamba2", {"conv_kernel": 2, "hidden_act": "gelu", "residual_in_fp32": False}),
]
ModelFactory = Callable[..., Any]


def documents(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 61, (n,), generator=generator) for n in lengths]


def make_batch(rows: list[Tensor], layout: str) -> Batch:
    """Each document supervised at all but its last position, in the order of the documents."""
    width = max(map(len, rows))
    if layout == "packed":
        width = sum(map(len, rows))
    input_ids = torch.zeros(1 if layout == "packed" else len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    positions, packed_start = [], 0
    for i, row in enumerate(rows):
        line = 0 if layout == "packed" else i
        start = {"right": 0, "left": width - len(row), "packed": packed_start}[layout]
        packed_start += len(row)
        input_ids[line, start : start + len(row)] = row
        mask[line, start : start + len(row)] = True
        positions.append(line * width + start + torch.arange(len(row) - 1))
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    return Batch(
        input_ids=input_ids,
        target_positions=torch.cat(positions),
        targets=torch.cat([row[1:] for row in rows]),
        sequence_ids=input_ids,
        position_ids=input_ids,
        attention_mask=None if layout == "packed" else mask,
        cu_seqlens=ends if layout == "packed" else None,
    )


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            ours[name],
            gradient,
            rtol=1e-4,
            atol=2e-5 * max(scale, 0.1),
            msg=lambda m, n=name: n + m,
        )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(
    tiny_stock_model: ModelFactory, family: str, changes: dict[str, Any], train: bool
) -> None:
    stock = tiny_stock_model(family, **changes).train(train)
    ours = copy.deepcopy(stock)
    adopt(ours)
    assert type(ours).__name__ == type(stock).__name__ and type(ours) is not type(stock)
    ids = torch.stack(documents(13, 13))
    expected, actual = (m(ids, use_cache=False, output_hidden_states=True) for m in (stock, ours))
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected.logits)
    (expected.logits * weights).sum().backward()
    (actual.logits * weights).sum().backward()
    theirs = gradients(stock)
    assert len(theirs) == len(list(stock.parameters()))
    assert_same_gradients(gradients(ours), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ways_to_ask_for_loss_and_logits_agree(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family).eval()
    rows = documents(7, 7)
    batch, ids = make_batch(rows, "right"), torch.stack(rows)
    full = model(ids).logits
    torch.testing.assert_close(
        common.token_logits(model, batch), full.flatten(0, 1)[batch.target_positions]
    )
    total = common.token_losses(model, batch)
    mean = model(ids, labels=ids).loss
    torch.testing.assert_close(total.loss / total.num_targets, mean)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, return_dict=False)[0], full)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, full)


@pytest.mark.parametrize("layout", ["packed", "right", "left"])
@pytest.mark.parametrize("changes", [{}, {"use_bias": True, "conv_kernel": 3}])
@pytest.mark.parametrize("family", FAMILIES)
def test_neither_packing_nor_padding_changes_losses_or_gradients(
    tiny_model: ModelFactory, family: str, changes: dict[str, Any], layout: str
) -> None:
    model = tiny_model(family, **changes)
    rows = documents(5, 1, 9, 2, 3)
    alone = []
    for row in rows:
        batch = make_batch([row], "right")
        alone.append(common.token_logits(model, batch))
        common.token_losses(model, batch).loss.backward()
    separate = gradients(model)
    together = make_batch(rows, layout)
    torch.testing.assert_close(
        common.token_logits(model, together), torch.cat(alone), rtol=1e-5, atol=1e-5
    )
    common.token_losses(model, together).loss.backward()
    assert_same_gradients(gradients(model), separate)


@pytest.mark.parametrize("pieces", [(1,) * 11, (2, 1, 5, 1, 1, 1), (6, 5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_is_the_full_forward(
    tiny_model: ModelFactory, family: str, pieces: tuple[int, ...]
) -> None:
    model = tiny_model(family).eval()
    ids = torch.stack(documents(11, 11))
    cache, logits = None, []
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            output = model(piece, cache_params=cache, use_cache=True)
            cache = output.cache_params
            logits.append(output.logits)
        full = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_left_padding_is_generation_one_by_one(
    tiny_model: ModelFactory, family: str, beams: int
) -> None:
    model = tiny_model(family, eos_token_id=None).eval()
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    prompts = documents(2, 7, 5)
    batch = make_batch(prompts, "left")
    together = model.generate(
        batch.input_ids, attention_mask=batch.attention_mask.long(), **options
    )
    for prompt, row in zip(prompts, together, strict=True):
        mask = torch.ones(1, len(prompt), dtype=torch.int64)
        one = model.generate(prompt[None], attention_mask=mask, **options)
        assert row[-6:].tolist() == one[0, -6:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family).train()
    calls = []
    model.backbone.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    for layout in ("packed", "left"):
        batch = make_batch(documents(5, 8), layout)
        common.token_losses(model, batch).loss.backward()
        plain = gradients(model)
        calls.clear()
        common.enable_gradient_checkpointing(model)
        common.token_losses(model, batch).loss.backward()
        model.gradient_checkpointing_disable()
        assert len(calls) == 2, "the layer was not computed again in the backward pass"
        assert_same_gradients(gradients(model), plain)


@pytest.mark.parametrize(("family", "projections"), [("mamba", 4), ("mamba2", 2)])
def test_lora_is_alive_and_every_projection_is_called_as_a_module(
    tiny_model: ModelFactory, family: str, projections: int
) -> None:
    model = tiny_model(family)
    called = set()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d)):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    batch = make_batch(documents(5, 8), "left")
    base_loss = common.token_losses(model, batch).loss
    assert len(called) == 2 * (projections + 1) + 1  # and the convolution; and the head
    # peft itself refuses out_proj by the model's type; see the tests of ssm_train.peft for it.
    targets = ["in_proj", "x_proj", "dt_proj"] if family == "mamba" else ["in_proj"]
    for options in ({}, {"use_dora": True}):
        adapted = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=targets, **options)
        )
        torch.testing.assert_close(
            common.token_losses(adapted, batch).loss, base_loss, rtol=1e-5, atol=1e-5
        )
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        common.token_losses(adapted, batch).loss.backward()
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * len(targets) * (3 if options else 2)
        assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in trained.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_keeps_the_state_space_parameters_in_fp32(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    torch.manual_seed(0)
    adapter = {"mamba": mamba.MAMBA, "mamba2": mamba.MAMBA2}[family]
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "state_size": 8}
    heads = {} if family == "mamba" else {"num_heads": 6, "head_dim": 8, "n_groups": 2}
    model = adapter.prepare(
        ModelSpec(new_model={"model_type": family, **sizes, **heads}, dtype=torch.bfloat16)
    ).model
    for name, parameter in model.named_parameters():
        kept = modules.matches(name, adapter.traits.keep_fp32)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name

    seen = []
    op = "selective_scan" if family == "mamba" else "ssd"
    original = getattr(mamba_mixer, op)

    def record(x: Tensor, dt: Tensor, *matrices: Tensor, **options: Any) -> Any:
        seen.append(F.softplus(dt) if options.get("dt_softplus") else dt)
        return original(x, dt, *matrices, **options)

    monkeypatch.setattr(mamba_mixer, op, record)
    mixer = model.backbone.layers[0].mixer
    bias = mixer.dt_proj.bias if family == "mamba" else mixer.dt_bias
    ids = torch.stack(documents(6))
    for shift in (0.0, 1e-4):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            bias += shift
            assert model(ids).logits.isfinite().all()
    before, after = seen
    assert before.dtype == torch.float32
    torch.testing.assert_close(after - before, 1e-4 * -torch.expm1(-before), rtol=0.05, atol=1e-8)

    model.to(torch.bfloat16)
    mixer.dtype_checked = False
    with pytest.raises(AssertionError, match="A_log of MambaMixer|A_log of Mamba2Mixer"):
        model(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_transformers_and_what_is_loaded_is_the_file(
    tiny_model: ModelFactory, write_tokenizer: Callable[..., None], tmp_path: Path, family: str
) -> None:
    model = tiny_model(family, **{"mamba": {}, "mamba2": {"n_groups": 1}}[family]).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # By name: once fla is imported, Auto classes make its own Mamba out of a Mamba checkpoint.
    stock_class = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}[family]
    assert config["architectures"] == [stock_class.__name__]
    stock, report = stock_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    ids = torch.stack(documents(9))
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)

    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    adapter = {"mamba": mamba.MAMBA, "mamba2": mamba.MAMBA2}[family]
    loaded = adapter.prepare(ModelSpec(model=str(tmp_path), dtype=torch.bfloat16))
    assert loaded.model.config.eos_token_id == loaded.tokenizer.eos_token_id == 2
    file = load_file(tmp_path / "model.safetensors")
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, file[name].to(parameter.dtype)), name
        if name.endswith("A_log"):
            assert parameter.dtype == torch.float32


def test_weights_that_do_not_fit_are_an_error(
    tiny_model: ModelFactory, write_tokenizer: Callable[..., None], tmp_path: Path
) -> None:
    tiny_model("mamba").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    path = tmp_path / "model.safetensors"
    file = load_file(path)
    name = "backbone.layers.1.mixer.A_log"
    wrong = {
        "1 missing": {k: v for k, v in file.items() if k != name},
        "1 unexpected (zoo)": file | {"zoo": torch.ones(1)},
        "1 of another shape": file | {name: torch.ones(3, 3)},
    }
    for expected, tensors in wrong.items():
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ValueError) as error:
            mamba.MAMBA.prepare(ModelSpec(model=str(tmp_path)))
        assert expected in str(error.value) and "\n" not in str(error.value)
