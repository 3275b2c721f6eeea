"""Bamba against transformers' own model: the family that proves the seam takes hybrids."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor
from transformers import BambaConfig, BambaForCausalLM

from ssm_train.adapters.bamba import BAMBA, TRAITS, adopt
from ssm_train.adapters.base import ModelSpec
from ssm_train.adapters.registry import resolve

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "attn_layer_indices": [1],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
    "vocab_size": 61,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 60,
}


def make_stock(**options) -> BambaForCausalLM:
    torch.manual_seed(0)
    model = BambaForCausalLM(BambaConfig(**TINY | options)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(("dt_bias", "D")):  # not the constants of the start
            torch.nn.init.uniform_(parameter, 0.3, 1.5)
    return model


def make_ours(**options) -> BambaForCausalLM:
    model = make_stock(**options)
    adopt(model)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 60, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"time_step_limit": [0.1, 1.0]}, {"mamba_expand": 4}])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients_equal_transformers(options, padded):
    stock, ours = make_stock(**options), make_ours(**options)
    ids, mask = tokens(2, 37), torch.ones(2, 37, dtype=torch.long)
    if padded:
        mask[0, 30:] = 0  # right padding, as in training
    results = []
    for model in (stock, ours):
        logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.logsumexp(-1).sum().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters()}))
    (expected, gradients), (got, our_gradients) = results
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_loss_of_a_step_in_parts_is_that_of_transformers():
    """Its Trainer gives the number of targets of all parts, and does not divide itself."""
    ids = tokens(2, 9)
    stock, ours = make_stock(), make_ours()
    expected = stock(ids, labels=ids, num_items_in_batch=torch.tensor(40), use_cache=False).loss
    options = {"labels": ids, "num_items_in_batch": torch.tensor(40), "use_cache": False}
    torch.testing.assert_close(ours(ids, **options).loss, expected)
    torch.testing.assert_close(ours(ids, **options, return_dict=False)[0], expected)


def test_cached_decode_equals_full_forward():
    ours = make_ours()
    ids = tokens(2, 9)
    full = ours(ids, use_cache=False).logits
    out = ours(ids[:, :5], use_cache=True)
    pieces = [out.logits]
    for position in range(5, 9):
        out = ours(
            ids[:, position, None],
            position_ids=torch.tensor([[position]]),  # as generate does; transformers' would be 0
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_with_left_padding_equals_one_by_one(num_beams):
    ours = make_ours()
    rows = [tokens(n, seed=n) for n in (4, 9)]
    ids = torch.stack([F.pad(row, (9 - len(row), 0), value=7) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (9 - len(row), 0)) for row in rows])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": num_beams}
    batched = ours.generate(ids, attention_mask=mask, do_sample=False, **options)[:, -5:]
    for row, generated in zip(rows, batched, strict=True):
        alone = ours.generate(row[None], do_sample=False, **options)[0, -5:]
        assert alone.tolist() == generated.tolist()


def test_lora_is_alive_on_every_projection():
    ours = make_ours().train()
    config = LoraConfig(r=2, target_modules=list(TRAITS.lora_targets), init_lora_weights=False)
    LoraModel(ours, config, "default")
    ids = tokens(2, 12)
    ours(ids, labels=ids).loss.backward()
    adapted = {n: p.grad for n, p in ours.named_parameters() if "lora_" in n}
    assert len(adapted) == 2 * (2 * 2 + 4 + 3 * 3)  # A, B: 2 mixers, 1 attention, 3 MLPs
    assert not [name for name, gradient in adapted.items() if not gradient.norm() > 0]


def test_prepare_routes_stores_and_reloads(tmp_path):
    spec = ModelSpec(new_model={"model_type": "bamba"} | TINY, gradient_checkpointing=True)
    adapter, reason = resolve(spec)
    assert adapter is BAMBA and "model_type bamba" in reason
    model = adapter.prepare(spec).model
    model.save_pretrained(tmp_path)
    stock, report = BambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = tokens(1, 7)
    expected = stock.eval()(ids).logits
    torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)
    half = adapter.prepare(
        ModelSpec(new_model={"model_type": "bamba"} | TINY, dtype=torch.bfloat16)
    )
    kept = {n for n, p in half.model.named_parameters() if p.dtype == torch.float32}
    assert {name.rsplit(".", 1)[1] for name in kept} == set(TRAITS.keep_fp32)
