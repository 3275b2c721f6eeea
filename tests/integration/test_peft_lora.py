"""LoRA on every family: the start changes nothing, what trains is alive, what is dead is caught."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft_tiny import (
    inject,
    logits_of,
    make_batch,
    make_stock,
    prepare,
    relative_error,
    token_losses,
    tokens,
    train_a_little,
)
from torch import nn

from ssm_train.adapters import common, modules
from ssm_train.errors import InputError
from ssm_train.health.liveness import check_liveness
from ssm_train.peft.coverage import measure_coverage
from ssm_train.peft.lora import lora_layers
from ssm_train.peft.spec import load_peft

FAMILIES = ("mamba", "mamba2", "gla", "bamba")
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_fast": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "olora_dora": {"init_lora_weights": "olora", "use_dora": True},
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@pytest.mark.parametrize("variant", ["pissa_fast", "olora_dora"])
def test_start_is_unchanged_and_every_factor_is_alive(family, variant):
    """Two variants at once; each by itself is in the support matrix."""
    prepared = prepare(family)
    before = logits_of(prepared.model, tokens(2, 13))
    inject(prepared, **VARIANTS[variant])
    assert relative_error(logits_of(prepared.model, tokens(2, 13)), before) < 1e-5
    check_liveness(prepared.model, make_batch(), common.token_losses)
    trained = {n for n, p in prepared.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


@every_family
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapted_forward_is_the_paper_s(family, use_dora):
    """Against the same model with dense weights W + s BA, or m (W + s BA) / |W + s BA|."""
    prepared = prepare(family)
    dense = copy.deepcopy(prepared.model)
    inject(prepared, use_dora=use_dora, lora_alpha=6)
    train_a_little(prepared.model)
    for name, layer in lora_layers(prepared.model).items():
        A, B = (getattr(layer, f"lora_{f}")["default"].weight.double() for f in "AB")
        weight = layer.base_layer.weight.double() + 6 / layer.r["default"] * B @ A
        if use_dora:
            magnitude = layer.lora_magnitude_vector["default"].weight.double()
            weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
        dense.get_submodule(name.removeprefix("base_model.model.")).weight.data = weight.float()
    ids = tokens(2, 13)
    assert relative_error(logits_of(prepared.model, ids), logits_of(dense, ids)) < 1e-5


@every_family
@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "olora_dora"])
def test_bf16_base_keeps_fp32_factors(family, variant):
    prepared = prepare(family, dtype=torch.bfloat16)
    dtypes = {n: p.dtype for n, p in prepared.model.named_parameters()}
    weights = {n: p.detach().float() for n, p in prepared.model.named_parameters()}
    inject(prepared, **VARIANTS[variant])
    for name, parameter in prepared.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
        else:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert parameter.dtype == dtypes[name], name
    for name, layer in lora_layers(prepared.model).items():
        A, B = (getattr(layer, f"lora_{f}")["default"].weight for f in "AB")
        residual = layer.base_layer.weight.float()
        error = (
            residual
            + layer.scaling["default"] * B @ A
            - weights[f"{name.removeprefix('base_model.model.')}.weight"]
        )
        # Only the residual is rounded to bf16: with factors in bf16, small residuals would be off.
        assert bool((error.abs() <= 2**-8 * residual.abs() + 1e-6).all()), name
    with torch.autocast("cpu", torch.bfloat16):
        check_liveness(prepared.model, make_batch(), common.token_losses)


@every_family
def test_the_choice_of_kernels_reaches_every_norm(family):
    norms = [m for m in prepare(family).model.modules() if "RMSNorm" in type(m).__name__]
    assert norms and all(norm.kernels == "auto" for norm in norms)


@every_family
def test_the_choice_of_kernels_survives_injection(family):
    prepared = prepare(family)
    modules = [m for m in prepared.model.modules() if hasattr(m, "kernels")]
    for module in modules:
        module.kernels = "reference"
    inject(prepared)
    assert modules and all(module.kernels == "reference" for module in modules)


@every_family
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_fp32_residual_would_change_nothing_in_bf16(family, init):
    """What is left of the base is stored in bf16: autocast rounds it there anyway."""
    prepared = prepare(family, dtype=torch.bfloat16)
    weights = {n: p.detach().float() for n, p in prepared.model.named_parameters()}

    @torch.autocast("cpu", torch.bfloat16)
    def bf16_logits():
        return logits_of(prepared.model, tokens(2, 13))

    before = bf16_logits()
    inject(prepared, init_lora_weights=init)
    rounded = bf16_logits()
    for name, layer in lora_layers(prepared.model).items():
        A, B = (getattr(layer, f"lora_{f}")["default"].weight.detach() for f in "AB")
        weight = weights[f"{name.removeprefix('base_model.model.')}.weight"]
        layer.base_layer.weight.data = weight - layer.scaling["default"] * B @ A
    assert torch.equal(bf16_logits(), rounded)
    assert (rounded - before).norm() < 0.03 * before.norm()


def test_pissa_holds_the_principal_part():
    prepared = prepare("mamba")
    weight = prepared.model.backbone.layers[0].mixer.in_proj.weight.detach().double()
    inject(prepared, target_modules=["in_proj"], init_lora_weights="pissa", lora_alpha=2)
    layer = lora_layers(prepared.model)["base_model.model.backbone.layers.0.mixer.in_proj"]
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    principal = (U[:, :4] * S[:4]) @ Vh[:4]
    A, B = (getattr(layer, f"lora_{f}")["default"].weight.double() for f in "AB")
    torch.testing.assert_close(2 / 4 * B @ A, principal, atol=1e-5, rtol=1e-4)


@every_family
def test_coverage_counts_everything(family):
    prepared = prepare(family)
    inject(prepared)
    coverage = measure_coverage(prepared.model)
    expected = {"mamba": 8, "mamba2": 4, "gla": 20, "bamba": 12}[family]
    assert coverage.adapted == coverage.linear_layers == expected
    assert sum(coverage.patterns.values()) == expected
    assert all("*" in pattern and count <= 2 for pattern, count in coverage.patterns.items())
    assert f"on {expected} of {expected} linear layers" in str(coverage)
    trainable = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    assert coverage.trainable == trainable


def test_coverage_says_what_is_left_out():
    prepared = prepare("mamba")
    inject(prepared, target_modules=["in_proj", "x_proj"], layers_to_transform=[1])
    coverage = measure_coverage(prepared.model)
    assert (coverage.adapted, coverage.linear_layers) == (2, 8)
    assert str(coverage).startswith("LoRA r=4 on 2 of 8 linear layers of the mixers and MLPs")


@every_family
def test_preflight_leaves_no_trace(family):
    prepared = prepare(family)
    inject(prepared, lora_dropout=0.5)
    model = prepared.model
    model.eval()
    model.base_model.train()  # a mixture of modes
    model.register_buffer("counter", torch.zeros(2))
    marked = next(p for p in model.parameters() if p.requires_grad)
    marked.grad = gradient = torch.ones_like(marked)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()

    def losses(model, batch):
        model.counter += 1
        return common.token_losses(model, batch)

    check_liveness(model, make_batch(), losses)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert marked.grad is gradient and bool((gradient == 1).all())
    assert all(p.grad is None for p in model.parameters() if p is not marked)
    assert all(not p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "LORA", "r": 2, "target_modules": ["dt_proj"], "lora_dropout": 0.5},
        {"peft_type": "LORA", "r": 2, "target_modules": ["dt_proj"]},
        {
            "peft_type": "SD_LORA", "lora_targets": ["dt_proj"], "proj_lora_r": 2,
            "proj_lora_dropout": 0.5,
        },
    ],
    ids=["dropout", "none", "another kind of dropout"],
)  # fmt: skip
def test_what_is_computed_again_drops_the_same(settings, monkeypatch):
    """Step sizes are made again in the backward pass, but not where they would be others."""
    prepared = prepare("mamba")
    load_peft(settings).make().inject(prepared)
    model = prepared.model.train()
    train_a_little(model)
    found, again = [], []
    recomputed = modules.recomputed
    monkeypatch.setattr(
        modules, "recomputed", lambda *v, **o: again.append(v) or recomputed(*v, **o)
    )
    for how in (modules.recompute_in, lambda module, function, x: function(x)):
        monkeypatch.setattr(modules, "recompute_in", how)
        model.zero_grad()
        torch.manual_seed(0)
        token_losses(model, make_batch()).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert bool(again) == ("dropout" not in str(settings))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


# Dead on purpose: forwards as the fused kernels have them, which read a weight past its module.


class RawMLP(nn.Module):
    def forward(self, x, **_):
        y = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return F.linear(y, self.down_proj.weight, self.down_proj.bias)


def fused_mamba(mixer, hidden_states):
    """The signature of mamba_ssm's inner function: everything after in_proj as raw weights."""
    x, z = mixer.in_proj(hidden_states).chunk(2, dim=-1)
    x = F.silu(x)
    n = mixer.ssm_state_size
    dt, B, C = F.linear(x, mixer.x_proj.weight).split([mixer.time_step_rank, n, n], dim=-1)
    dt = F.softplus(F.linear(dt, mixer.dt_proj.weight, mixer.dt_proj.bias))
    A = -torch.exp(mixer.A_log)
    state, ys = 0, []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt * x)[:, t, :, None] * B[:, t, None]
        ys.append((state * C[:, t, None]).sum(-1))
    y = (torch.stack(ys, 1) + mixer.D * x) * F.silu(z)
    return F.linear(y, mixer.out_proj.weight, mixer.out_proj.bias)


def dead_modules(model, losses=token_losses, **options) -> str:
    with pytest.raises(InputError) as error:
        check_liveness(model, make_batch(), losses, **options)
    return str(error.value)


def test_catches_dt_proj_of_stock_mamba():
    config = LoraConfig(r=2, target_modules=["in_proj", "dt_proj"])
    message = dead_modules(get_peft_model(make_stock("mamba"), config))
    assert "4 of 8 trainable tensors get no gradient" in message
    assert "backbone.layers.*.mixer.dt_proj (lora_A, lora_B) in 2 layers" in message
    assert "in_proj" not in message and "reads the layer's weight directly" in message


def test_catches_the_fused_mamba_path(monkeypatch):
    prepared = prepare("mamba")
    inject(prepared)
    for block in prepared.model.get_base_model().backbone.layers:
        monkeypatch.setattr(
            block.mixer, "forward", lambda x, *_, mixer=block.mixer, **__: fused_mamba(mixer, x)
        )
    message = dead_modules(prepared.model)
    assert "12 of 16" in message and "mixer.in_proj" not in message
    for name in ("x_proj", "dt_proj", "out_proj"):
        assert f"mixer.{name} (lora_A, lora_B) in 2 layers" in message


def test_catches_the_fused_end_of_mamba2(monkeypatch):
    prepared = prepare("mamba2")
    inject(prepared)
    for block in prepared.model.get_base_model().backbone.layers:
        raw = block.mixer.out_proj
        monkeypatch.setattr(raw, "forward", lambda y, raw=raw: F.linear(y, raw.weight, raw.bias))
    message = dead_modules(prepared.model)
    assert "4 of 8" in message and "mixer.out_proj (lora_A, lora_B) in 2 layers" in message


def test_catches_the_fused_swiglu_of_gla():
    prepared = prepare("gla")
    inject(prepared)
    for layer in prepared.model.get_base_model().model.layers:
        layer.mlp.__class__ = type("RawMLP", (RawMLP, type(layer.mlp)), {})
    message = dead_modules(prepared.model)
    assert "4 of 40" in message and "mlp.down_proj (lora_A, lora_B) in 2 layers" in message


def test_one_dead_layer_is_named_in_full():
    prepared = prepare("gla")
    inject(prepared)
    layer = prepared.model.get_base_model().model.layers[1]
    layer.mlp.__class__ = type("RawMLP", (RawMLP, type(layer.mlp)), {})
    assert "model.layers.1.mlp.down_proj (lora_A, lora_B)." in dead_modules(prepared.model)


def test_exceptions_ranks_and_bad_numbers():
    model = get_peft_model(
        make_stock("mamba"), LoraConfig(r=2, target_modules=["in_proj", "dt_proj"])
    )
    check_liveness(model, make_batch(), token_losses, may_be_idle=["dt_proj"])
    check_liveness(model, make_batch(), token_losses, may_be_idle=["*.mixer.dt_proj.*"])
    assert "dt_proj" in dead_modules(model, may_be_idle=["proj"])
    # Another rank saw gradients where this one saw none: experts that this batch did not choose.
    check_liveness(model, make_batch(), token_losses, reduce_max=lambda norms: norms + 1)

    def infinite(model, batch):
        losses = token_losses(model, batch)
        losses.loss = losses.loss * float("inf")
        return losses

    assert "not finite (loss inf)" in dead_modules(model, losses=infinite)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        check_liveness(model, make_batch(), token_losses)
