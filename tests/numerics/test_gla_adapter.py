"""GLA against fla's own model, its Triton pieces replaced here by independent plain functions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("fla", reason="fla needs Linux")

import fla.layers.gla as fla_layer
import fla.modules.mlp as fla_mlp
from fla.models.gla import GLAConfig
from fla.models.gla import GLAForCausalLM as FlaGLAForCausalLM
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.ops.gla.naive import naive_recurrent_gla
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ssm_train.adapters import gla as gla_module
from ssm_train.adapters.base import ModelSpec
from ssm_train.adapters.gla import GLA, adopt
from ssm_train.errors import InputError

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
    "initializer_range": 0.2,
    "norm_eps": 1e-3,  # with 1e-6 the norm of a near-zero output amplifies rounding 1000 times
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 60,
}
VARIANTS = {
    "plain": {},
    "grouped_values": {"num_kv_heads": 2},
    "feature_map": {"feature_map": "sigmoid"},
    "short_conv": {"use_short_conv": True},
    "no_output_gate": {"use_output_gate": False},
    "clamped_gate": {"clamp_min": -0.03},
    "no_affine": {"elementwise_affine": False},
    "unfused_norm": {"fuse_norm": False},
    "unfused_swiglu": {"fuse_swiglu": False},
    "tied": {"tie_word_embeddings": True},
    "all_at_once": {
        "num_kv_heads": 1,
        "use_short_conv": True,
        "feature_map": "gelu",
        "fuse_norm": False,
        "fuse_swiglu": False,
        "expand_k": 1.0,
        "expand_v": 2.0,
    },
}


def make_stock(seed: int = 0, **options) -> FlaGLAForCausalLM:
    torch.manual_seed(seed)
    model = FlaGLAForCausalLM(GLAConfig(**TINY | options))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # not the ones and zeros of the start
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    return model


def make_ours(seed: int = 0, **options):
    return adopt(make_stock(seed, **options))


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 60, shape, generator=torch.Generator().manual_seed(seed))


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows [T_i] to [B, max T] and their mask. The padding is a real token: only masks hide it."""
    width = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        gap, ones = width - len(row), torch.ones_like(row)
        where = (gap, 0) if side == "left" else (0, gap)
        ids.append(F.pad(row, where, value=7))
        mask.append(F.pad(ones, where))
    return torch.stack(ids), torch.stack(mask)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tol=1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.abs().max() > 0, name
        error = (ours[name] - expected).norm() / expected.norm()
        assert error < tol, f"{name}: {error:.1e}"


@pytest.fixture
def plain_fla(monkeypatch):
    """fla's model on a CPU: every Triton or torch.compile function replaced by a plain one."""

    def recurrence(q, k, v, gk=None, g=None, initial_state=None, cu_seqlens=None, **_):
        gk = g if gk is None else gk
        assert initial_state is None
        if cu_seqlens is None:
            return naive_recurrent_gla(q, k, v, gk)
        bounds = cu_seqlens.tolist()
        spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        parts = [naive_recurrent_gla(q[:, s], k[:, s], v[:, s], gk[:, s])[0] for s in spans]
        return torch.cat(parts, 1), None

    def norm(self, x, residual=None, prenorm=False):
        x = x if residual is None else x + residual
        y = F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return (y, x) if prenorm else y

    def gated_norm(self, x, g):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps) * F.silu(g)

    def convolution(self, x, cache=None, output_final_state=False, cu_seqlens=None):
        assert cache is None
        width = self.kernel_size[0]
        bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        parts = []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            document = F.pad(x[:, start:stop].mT, (width - 1, 0))
            parts.append(F.silu(F.conv1d(document, self.weight, groups=x.shape[-1])).mT)
        return torch.cat(parts, 1), None

    def swiglu_linear(x, y, weight, bias):
        return F.linear(F.silu(x) * y, weight, bias)

    monkeypatch.setattr(fla_layer, "chunk_gla", recurrence)
    monkeypatch.setattr(fla_layer, "fused_recurrent_gla", recurrence)
    monkeypatch.setattr(fla_mlp, "swiglu", lambda x, y: F.silu(x) * y)
    monkeypatch.setattr(fla_mlp, "swiglu_linear", swiglu_linear)
    monkeypatch.setattr(RMSNorm, "forward", norm)
    monkeypatch.setattr(FusedRMSNormGated, "forward", gated_norm)
    monkeypatch.setattr(ShortConvolution, "forward", convolution)

    def make(**options) -> FlaGLAForCausalLM:
        model = make_stock(**options)
        functions = {"sigmoid": torch.sigmoid, "gelu": lambda x: F.gelu(x, approximate="tanh")}
        for layer in model.model.layers:
            layer.attn.gate_fn = F.silu
            if options.get("feature_map"):
                layer.attn.feature_map_fn = functions[options["feature_map"]]
        return model

    return make


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 37, 70])
def test_logits_and_gradients_equal_fla(plain_fla, variant, length):
    options = VARIANTS[variant]
    stock, ours = plain_fla(**options), make_ours(**options)
    ids = tokens(2, length)
    expected = stock(ids, use_cache=False).logits
    got = ours(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if length < 2:
        return
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    assert len(gradients(ours)) == len(list(ours.parameters()))
    assert_same_gradients(gradients(ours), gradients(stock))


def test_the_loss_of_a_step_in_parts_is_a_part_of_it():
    """Trainers of transformers give the targets of all parts, and do not divide themselves."""
    ours, ids = make_ours(), tokens(2, 9)
    options = {"labels": ids, "use_cache": False}
    expected = ours(ids, **options).loss * (2 * 8 / 40)
    options |= {"num_items_in_batch": torch.tensor(40)}
    torch.testing.assert_close(ours(ids, **options).loss, expected)
    torch.testing.assert_close(ours(ids, **options, return_dict=False)[0], expected)


@pytest.mark.parametrize("variant", ["plain", "short_conv"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(plain_fla, variant, side):
    stock, ours = plain_fla(**VARIANTS[variant]), make_ours(**VARIANTS[variant])
    rows = [tokens(n, seed=n) for n in (5, 21, 1)]
    ids, mask = pad(rows, side)
    padded = ours(ids, attention_mask=mask, use_cache=False).logits
    unpadded_by_fla = stock(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(padded[mask.bool()], unpadded_by_fla[mask.bool()], rtol=0, atol=1e-5)
    alone = [ours(row[None], use_cache=False).logits[0] for row in rows]
    torch.testing.assert_close(padded[mask.bool()], torch.cat(alone), rtol=0, atol=1e-5)

    weight = torch.randn(mask.sum(), TINY["vocab_size"])
    (padded[mask.bool()] * weight).sum().backward()
    batched = gradients(ours)
    ours.zero_grad()
    (torch.cat(alone) * weight).sum().backward()
    assert_same_gradients(batched, gradients(ours))


@pytest.mark.parametrize("variant", ["plain", "short_conv"])
def test_packed_documents_equal_separate_ones(variant):
    ours = make_ours(**VARIANTS[variant])
    rows = [tokens(n, seed=n) for n in (3, 1, 40, 66)]
    bounds = torch.tensor([0, 3, 4, 44, 110], dtype=torch.int32)
    packed = ours(torch.cat(rows)[None], cu_seqlens=bounds, use_cache=False).logits[0]
    alone = torch.cat([ours(row[None], use_cache=False).logits[0] for row in rows])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    weight = torch.randn_like(alone)
    (packed * weight).sum().backward()
    together = gradients(ours)
    ours.zero_grad()
    (alone * weight).sum().backward()
    assert_same_gradients(together, gradients(ours))


@pytest.mark.parametrize("variant", ["plain", "short_conv", "all_at_once"])
def test_cached_decode_equals_full_forward(variant):
    ours = make_ours(**VARIANTS[variant]).eval()
    ids = tokens(2, 12)
    full = ours(ids).logits
    out = ours(ids[:, :5], use_cache=True)
    pieces = [out.logits]
    for piece in (ids[:, 5:6], ids[:, 6:9], *ids[:, 9:].split(1, dim=1)):
        out = ours(piece, past_key_values=out.past_key_values, use_cache=True)
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-5)
    assert out.past_key_values.get_seq_length() == 12


@pytest.mark.parametrize("variant", ["plain", "short_conv"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_with_left_padding_equals_one_by_one(variant, num_beams):
    ours = make_ours(**VARIANTS[variant]).eval()
    rows = [tokens(n, seed=n) for n in (4, 9, 1)]
    ids, mask = pad(rows, "left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": num_beams}
    batched = ours.generate(ids, attention_mask=mask, do_sample=False, **options)[:, -6:]
    for row, generated in zip(rows, batched, strict=True):
        one = ours.generate(
            row[None], attention_mask=torch.ones(1, len(row)), do_sample=False, **options
        )
        assert one[0, -6:].tolist() == generated.tolist()
    if num_beams == 1:  # and greedy decoding is the argmax of uncached forwards
        row = rows[1]
        for token in batched[1]:
            assert ours(row[None], use_cache=False).logits[0, -1].argmax() == token
            row = torch.cat([row, token[None]])


def test_gradient_checkpointing_changes_nothing():
    ours = make_ours(use_short_conv=True).train()
    ids = tokens(2, 33)
    ours(ids, labels=ids).loss.backward()
    expected = gradients(ours)
    ours.zero_grad()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours(ids, labels=ids).loss.backward()
    assert_same_gradients(gradients(ours), expected, tol=1e-6)


def test_lora_on_every_projection_is_alive():
    ours = make_ours()
    targets = list(gla_module.TRAITS.lora_targets)
    model = get_peft_model(ours, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    ids = tokens(2, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    norms = {n: p.grad.norm() for n, p in model.named_parameters() if p.requires_grad}
    assert len(norms) == 2 * 2 * len(targets)  # A and B, 2 layers
    dead = [name for name, norm in norms.items() if not norm > 0]
    assert not dead
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
    for target in targets:  # each one alone changes the output
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1 if f".{target}." in name else 0.0)
        assert not torch.allclose(model(input_ids=ids).logits, plain, atol=1e-4), target


def test_a_stock_model_with_an_adapter_is_adopted():
    stock = get_peft_model(make_stock(), LoraConfig(r=2, target_modules=["down_proj", "gk_proj.1"]))
    adopt(stock.base_model.model)
    ids = tokens(1, 9)
    expected = make_ours()(ids).logits
    torch.testing.assert_close(stock(input_ids=ids).logits, expected, rtol=0, atol=1e-6)


def test_the_checkpoints_own_tokenizer_wins(saved, tmp_path_factory):
    other = word_tokenizer()
    other.add_tokens(["another"])
    elsewhere = tmp_path_factory.mktemp("tokenizer")
    other.save_pretrained(elsewhere)
    prepared = GLA.prepare(ModelSpec(model=str(saved), tokenizer=str(elsewhere)))
    assert len(prepared.tokenizer) == 61
    new_model = {k: v for k, v in TINY.items() if k != "vocab_size"} | {"model_type": "gla"}
    prepared = GLA.prepare(ModelSpec(new_model=new_model, tokenizer=str(elsewhere)))
    assert prepared.model.lm_head.weight.shape[0] == len(prepared.tokenizer) == 62


def test_sizes_that_fla_cannot_build_are_one_clear_error():
    for options, message in (({"hidden_size": 33}, "33|16.5"), ({"hidden_act": "relu"}, "relu")):
        with pytest.raises(InputError, match=message):
            GLA.prepare(ModelSpec(new_model={"model_type": "gla"} | TINY | options))


def test_hybrid_and_residual_attention_are_refused_by_name():
    for options, name in (
        ({"attn": {"layers": [0], "num_heads": 4, "num_kv_heads": 4}}, "attn"),
        ({"attnres_block_size": 2}, "attnres_block_size"),
    ):
        with pytest.raises(InputError, match=name):
            GLA.prepare(ModelSpec(new_model={"model_type": "gla"} | TINY | options))


def test_triton_without_a_gpu_is_refused():
    spec = ModelSpec(new_model={"model_type": "gla"} | TINY, kernels="triton", device="cpu")
    with pytest.raises(InputError, match="kernels"):
        GLA.prepare(spec)
    prepared = GLA.prepare(ModelSpec(new_model={"model_type": "gla"} | TINY))
    assert prepared.kernels["gla"] == "reference"
    assert prepared.tokenizer is None


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(60)} | {"<end>": 60}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="<end>"
    )


@pytest.fixture
def saved(tmp_path):
    """A checkpoint directory: make_ours() and a tokenizer."""
    make_ours().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_save_and_load_are_exact(saved):
    ours = make_ours()
    loaded = GLA.prepare(ModelSpec(model=str(saved))).model
    assert type(loaded) is type(ours)
    for (name, a), (_, b) in zip(
        ours.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    ids = tokens(1, 11)
    assert torch.equal(loaded(ids).logits, ours(ids).logits)
    stock, info = FlaGLAForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert type(stock) is FlaGLAForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_bf16_storage_keeps_the_gate_bias(saved):
    spec = ModelSpec(model=str(saved), dtype=torch.bfloat16)
    model = GLA.prepare(spec).model.eval()
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"model.layers.{i}.attn.gk_proj.1.bias" for i in range(2)}
    exact = FlaGLAForCausalLM.from_pretrained(saved).model.layers[0].attn.gk_proj[1].bias
    attn = model.model.layers[0].attn
    assert torch.equal(attn.gk_proj[1].bias, exact)

    x = torch.randn(1, 3, TINY["hidden_size"], dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = attn._log_decay(attn.gk_proj[0](x))
        attn.gk_proj[1].bias += 1e-4
        after = attn._log_decay(attn.gk_proj[0](x))
    assert before.dtype == torch.float32
    change = (after - before).abs()
    slope = torch.sigmoid(-attn.gk_proj(x)).detach().unflatten(-1, (4, -1)) / 16
    torch.testing.assert_close(change, 1e-4 * slope, rtol=0.05, atol=1e-8)

    attn.gk_proj[1].to(torch.bfloat16)
    attn.dtype_checked = False
    with pytest.raises(AssertionError, match="fp32"):
        model(tokens(1, 4))


def test_bf16_autocast_stays_close_to_fp32():
    ours = make_ours().eval()
    ids = tokens(2, 70)
    exact = ours(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ours(ids).logits
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


IMPORT_ORDER = """
import sys, json
{imports}
from ssm_train.adapters.base import ModelSpec
from ssm_train.adapters.registry import resolve
found = {{}}
for kind, options in {models!r}.items():
    adapter, _ = resolve(ModelSpec(new_model=dict(options, model_type=kind)))
    model = adapter.prepare(ModelSpec(new_model=dict(options, model_type=kind))).model
    found[kind] = sorted({{type(m).__module__ + "." + type(m).__name__ for m in model.modules()}})
print(json.dumps(found))
"""


def test_import_order_of_fla_and_transformers_does_not_matter():
    """fla registers its own mamba classes with transformers' AutoModel when it is imported."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 61}
    models = {
        "mamba": small | {"state_size": 4},
        "mamba2": small | {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1},
        "gla": TINY,
    }
    orders = (
        "import fla, fla.models, transformers",
        "import transformers.models.mamba.modeling_mamba, fla.models",
    )
    processes = [  # side by side: importing fla takes seconds
        subprocess.Popen(
            [sys.executable, "-c", IMPORT_ORDER.format(imports=imports, models=models)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for imports in orders
    ]
    outputs = [process.communicate()[0].splitlines()[-1] for process in processes]
    assert "ssm_train.adapters.gla_mixer.GatedLinearAttention" in outputs[0]
    assert "ssm_train.adapters.mamba_mixer.Mamba2Mixer" in outputs[0]
    assert "fla.models.mamba" not in outputs[0]
    assert outputs[0] == outputs[1]
