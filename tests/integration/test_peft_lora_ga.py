"""LoRA-GA: whose gradient it is, what the start promises, and what a run keeps of it."""

import copy
import math
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft_tiny import (
    inject,
    logits_of,
    make_batch,
    prepare,
    relative_error,
    tokens,
)
from tiny_runs import (
    LORA_GA,
    assert_same_run,
    exported,
    losses,
    stop_in_step,
    train,
    write_config,
)
from torch import nn

from ssm_train import load_run
from ssm_train.adapters import common
from ssm_train.errors import InputError
from ssm_train.health.liveness import check_liveness
from ssm_train.peft import lora
from ssm_train.peft.lora import lora_layers
from ssm_train.peft.lora_ga import mean_gradients, singular_vectors, split_by_layer

FAMILIES = ("mamba", "mamba2", "gla", "bamba")
VARIANTS = {
    "paper": {"lora_alpha": 6},
    "rslora": {"use_rslora": True, "loraga_stable_c": 0.25},
    "dora": {"use_dora": True},
    "legacy": {"direction": "legacy", "loraga_stable_c": 4.0},
    "layerwise": {"loraga_layerwise": True, "loraga_batch_size": 2, "loraga_steps": 2},
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def examples():
    """One example a batch, of several lengths, without an end."""
    return (make_batch(1, 9 + k % 5, seed=20 + k) for k in count())


def inject_lora_ga(prepared, **settings):
    """As `peft_tiny.inject`; dt_proj of the tiny Mamba is 64 x 2, so 2r <= 2."""
    settings = {"init_lora_weights": "lora_ga"} | settings
    if prepared.model.config.model_type == "mamba" and "target_modules" not in settings:
        settings["rank_pattern"] = {"dt_proj": 1}
    return inject(prepared, **settings)


def start(prepared, batches=None, losses=common.token_losses, **settings):
    method = inject_lora_ga(prepared, **settings)
    method.calibrate(prepared, batches or examples(), losses)
    return method


def factors(layer):
    """A [r, in], B [out, r], and the scale of their product, in float64."""
    A, B = (getattr(layer, f"lora_{f}")["default"].weight.detach().double() for f in "AB")
    return A, B, layer.scaling["default"]


def dense_weight(layer):
    A, B, scaling = factors(layer)
    return layer.get_base_layer().weight.detach().double() + scaling * B @ A


def base_weights(model):
    return {name: layer.get_base_layer().weight for name, layer in lora_layers(model).items()}


def cosine(a, b):
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@every_family
@pytest.mark.parametrize("variant", VARIANTS)
def test_start_is_unchanged_alive_and_of_the_length_asked_for(family, variant):
    prepared = prepare(family)
    before = logits_of(prepared.model, tokens(2, 13))
    start(prepared, **VARIANTS[variant])
    assert relative_error(logits_of(prepared.model, tokens(2, 13)), before) < 1e-5
    check_liveness(prepared.model, make_batch(), common.token_losses)
    for name, layer in lora_layers(prepared.model).items():
        A, B, scaling = factors(layer)
        length = VARIANTS[variant].get("loraga_stable_c", 1.0) ** 0.5
        assert scaling * (B @ A).norm() == pytest.approx(length, rel=1e-4), name
        if variant != "legacy":
            assert A.norm() == pytest.approx(float(B.norm()), rel=1e-4), name


@every_family
def test_gradients_are_those_of_the_dense_model(family):
    """Two examples one by one, against autograd on both as one batch of a model without LoRA."""
    prepared = prepare(family)
    dense = copy.deepcopy(prepared.model)
    inject_lora_ga(prepared, lora_dropout=0.5, use_dora=True)
    both = make_batch()
    each = [make_batch(1), make_batch(1)]
    for row, batch in enumerate(each):
        batch.input_ids = both.input_ids[row : row + 1]
        batch.targets = both.targets.view(2, -1)[row]
    weights = base_weights(prepared.model)
    gradients = mean_gradients(prepared.model, weights, each, common.token_losses)
    loss = common.token_losses(dense, both)
    (loss.loss / loss.num_targets).backward()
    for name, gradient in gradients.items():
        expected = dense.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@every_family
def test_layer_by_layer_is_one_pass(family):
    models = []
    for layerwise in (False, True):
        prepared = prepare(family)
        start(prepared, loraga_layerwise=layerwise, loraga_steps=3)
        models.append(prepared.model.state_dict())
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("layerwise", [False, True])
def test_only_the_weights_in_question_require_gradients(layerwise):
    prepared, seen = prepare("mamba2"), []

    def watch(model, batch):
        seen.append({name for name, p in model.named_parameters() if p.requires_grad})
        return common.token_losses(model, batch)

    start(prepared, losses=watch, loraga_layerwise=layerwise)
    layers = [
        {
            f"base_model.model.backbone.layers.{layer}.mixer.{target}.base_layer.weight"
            for target in ("in_proj", "out_proj")
        }
        for layer in (0, 1)
    ]
    assert seen == (layers if layerwise else [layers[0] | layers[1]])


def test_parts_are_the_layers():
    names = ["m.layers.0.a", "m.layers.0.b.1", "m.layers.11.a", "m.head"]
    assert split_by_layer(names) == [names[:2], names[2:3], names[3:]]


@every_family
def test_the_first_step_is_the_best_part_of_the_gradient(family):
    """Theorem 3.1: a step of A and B moves W by the gradient's best approximation of rank 2r."""
    batch = make_batch()
    cosines = {}
    for init in ("lora_ga", True):
        prepared = prepare(family)
        method = inject_lora_ga(prepared, init_lora_weights=init)
        layers = lora_layers(prepared.model)
        gradients = mean_gradients(
            prepared.model, base_weights(prepared.model), [batch], common.token_losses
        )
        method.calibrate(prepared, iter([batch]), common.token_losses)
        before = {name: dense_weight(layer) for name, layer in layers.items()}
        trained = [p for p in prepared.model.parameters() if p.requires_grad]
        loss = common.token_losses(prepared.model, batch)
        (loss.loss / loss.num_targets).backward()
        torch.optim.SGD(trained, lr=1e-2).step()
        cosines[init] = {
            name: cosine(before[name] - dense_weight(layer), gradients[name].double())
            for name, layer in layers.items()
        }
    for name, found in cosines["lora_ga"].items():
        values = torch.linalg.svdvals(gradients[name].double())
        rank = layers[name].r["default"]
        best = (values[: 2 * rank].square().sum() / values.square().sum()).sqrt().item()
        assert found == pytest.approx(best, abs=1e-3), name
        assert found > cosines[True][name], name


def test_factors_are_peft_s_up_to_sign_and_length():
    prepared = prepare("gla")
    theirs = copy.deepcopy(prepared.model)
    batch = make_batch()
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj", "gk_proj.0"]
    start(prepared, iter([batch]), target_modules=targets)

    def train_step():
        loss = common.token_losses(theirs, batch)
        (loss.loss / loss.num_targets).backward()

    config = LoraConfig(
        r=4,
        target_modules=targets,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable"),
    )
    preprocess_loraga(theirs, config, train_step)
    expected = lora_layers(get_peft_model(theirs, config))
    for name, layer in lora_layers(prepared.model).items():
        (A, B, _), (their_A, their_B, _) = factors(layer), factors(expected[name])
        pairs = [*zip(A, their_A, strict=True), *zip(B.T, their_B.T, strict=True)]
        # PEFT's SVD is a randomised one, and neighbouring singular values mix in it.
        assert all(abs(cosine(a, b)) > 0.999 for a, b in pairs), name


def test_large_gradients_are_decomposed_by_a_sketch():
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(700, 600, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(600, 600, generator=generator))
    matrix = (U * torch.arange(1, 601) ** -1.0) @ V.T
    random = torch.get_rng_state()
    U_found, S, Vh = singular_vectors(matrix, 16)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(singular_vectors(matrix, 16)[0], U_found)
    assert U_found.shape[1] < 600  # not the whole one
    torch.testing.assert_close(S[:16], torch.arange(1, 17) ** -1.0, atol=1e-5, rtol=1e-4)
    assert all(abs(cosine(U_found[:, i], U[:, i])) > 0.9999 for i in range(16))
    assert all(abs(cosine(Vh[i], V[:, i])) > 0.9999 for i in range(16))


@every_family
def test_calibration_leaves_no_trace(family):
    prepared = prepare(family)
    method = inject_lora_ga(prepared, lora_dropout=0.5)
    model = prepared.model.train()
    next(iter(lora_layers(model).values())).eval()
    required = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    touched = {id(p) for layer in lora_layers(model).values() for p in layer.parameters()}
    others = {name: p.clone() for name, p in model.named_parameters() if id(p) not in touched}
    random = torch.get_rng_state()
    method.calibrate(prepared, examples(), common.token_losses)
    assert torch.equal(torch.get_rng_state(), random)
    assert [p.requires_grad for p in model.parameters()] == required
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(model.get_parameter(name), p) for name, p in others.items())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method.calibrate(prepared, examples(), common.token_losses)  # a start is made once
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["mamba", "gla"])
def test_recomputed_activations_give_the_same_start(family):
    models = []
    for checkpointing in (False, True):
        prepared = prepare(family)
        if checkpointing:
            common.enable_gradient_checkpointing(prepared.model)
        start(prepared)
        models.append(prepared.model.state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_dropout_is_off_while_gradients_are_taken():
    models = []
    for dropout in (0.0, 0.5):
        prepared = prepare("bamba", attention_dropout=dropout)
        prepared.model.train()
        start(prepared)
        models.append(prepared.model.state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


@every_family
def test_bf16_base_is_rounded_once(family):
    prepared = prepare(family, dtype=torch.bfloat16)
    weights = {n: m.weight.detach().clone() for n, m in modules_of(prepared.model).items()}

    @torch.autocast("cpu", torch.bfloat16)
    def bf16_losses(model, batch):
        return common.token_losses(model, batch)

    @torch.autocast("cpu", torch.bfloat16)
    def bf16_logits():
        return logits_of(prepared.model, tokens(2, 13))

    before = bf16_logits()
    start(prepared, losses=bf16_losses)
    for name, layer in lora_layers(prepared.model).items():
        A, B, scaling = factors(layer)
        assert layer.lora_A["default"].weight.dtype == torch.float32
        residual = layer.get_base_layer().weight
        assert residual.dtype == torch.bfloat16
        error = residual + scaling * B @ A - weights[name.removeprefix("base_model.model.")]
        assert bool((error.abs() <= 2**-8 * residual.double().abs() + 1e-6).all()), name
    assert (bf16_logits() - before).norm() < 0.05 * before.norm()


def modules_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


# ---------------------------------------------------------------- what cannot start


class RawMLP(nn.Module):
    """As a fused kernel has it: the weight is read past its module, so that its LoRA is dead."""

    def forward(self, x, **_):
        y = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return F.linear(y, self.down_proj.weight, self.down_proj.bias)


def test_a_matrix_that_is_read_past_its_module_is_caught():
    prepared = prepare("gla")
    for layer in prepared.model.model.layers:
        layer.mlp.__class__ = type("RawMLP", (RawMLP, type(layer.mlp)), {})
    start(prepared)
    with pytest.raises(InputError, match="4 of 40 .*mlp.down_proj"):
        check_liveness(prepared.model, make_batch(), common.token_losses)


def test_a_matrix_without_a_gradient_keeps_its_plain_start_and_is_caught():
    prepared = prepare("gla")
    spare = nn.Linear(32, 32)
    prepared.model.model.layers[0].spare = spare
    weight = spare.weight.detach().clone()
    start(prepared, target_modules=["q_proj", "spare"])
    assert torch.equal(spare.weight, weight)
    with pytest.raises(InputError, match="2 of 6 .*spare"):
        check_liveness(prepared.model, make_batch(), common.token_losses)


def test_a_gradient_that_is_not_finite_is_refused():
    def infinite(model, batch):
        losses = common.token_losses(model, batch)
        losses.loss = losses.loss * math.inf
        return losses

    prepared = prepare("mamba")
    state = {}
    method = inject_lora_ga(prepared)
    state = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    with pytest.raises(InputError, match=r"layers.0.mixer.in_proj is not finite") as error:
        method.calibrate(prepared, examples(), infinite)
    assert "\n" not in str(error.value)
    assert all(torch.equal(t, state[name]) for name, t in prepared.model.state_dict().items())


def test_a_matrix_of_too_few_singular_vectors_is_refused():
    with pytest.raises(InputError, match=r"dt_proj is 64 x 2; add rank_pattern \{\"dt_proj\": 1\}"):
        inject(prepare("mamba"), init_lora_weights="lora_ga")
    inject(prepare("mamba"), init_lora_weights="lora_ga", direction="legacy")


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("prec", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gla", "mamba"])
def test_a_run_starts_at_the_base_and_learns(family, prec, tmp_path, capsys):
    plain = LORA_GA | {"init_lora_weights": True}
    plain = {key: value for key, value in plain.items() if "loraga" not in key}
    runs = {
        name: train(
            write_config(
                tmp_path, name, family, peft=peft, prec=prec, max_steps=4, learning_rate=3e-3
            )
        )
        for name, peft in {"plain": plain, "ga": LORA_GA}.items()
    }
    first, last = (losses(runs["ga"].run_dir)[step] for step in (0, -1))
    tolerance = 1e-5 if prec == "fp32" else 2e-2
    assert first == pytest.approx(losses(runs["plain"].run_dir)[0], rel=tolerance)
    assert last < first
    adapted = 10 if family == "gla" else 4
    line = f"learning rate x 4 for {adapted} of {2 * adapted} trained tensors"
    assert capsys.readouterr().out.count(line) == 2
    assert all(
        4 in tensor.shape for name, tensor in exported(runs["ga"].run_dir).items()
    )  # rank 2r
    load_run(runs["ga"].run_dir)


def test_a_run_gives_b_its_own_learning_rate(tmp_path):
    """The first step of AdamW is the learning rate times what the gradient alone decides."""
    plain = {"peft_type": "LORA", "r": 2}
    one, four = (
        exported(
            train(
                write_config(
                    tmp_path,
                    f"ratio{ratio}",
                    "gla",
                    peft=plain | {"loraplus_lr_ratio": ratio},
                    max_steps=1,
                    skip_eval=True,
                )
            ).run_dir
        )
        for ratio in (1.0, 4.0)
    )
    for name, tensor in one.items():
        assert tensor.any()
        assert torch.equal(four[name], (4 if "lora_B" in name else 1) * tensor), name


def test_a_stopped_run_takes_its_start_from_the_checkpoint(tmp_path, monkeypatch):
    whole = train(write_config(tmp_path, "whole", "mamba", peft=LORA_GA))
    config = write_config(tmp_path, "stopped", "mamba", peft=LORA_GA)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert train(config).outcome == "stopped"

    def recompute(*_):
        raise AssertionError("a resumed run has its start")

    monkeypatch.setattr(lora, "start_along_gradients", recompute)
    resumed = train(config, resume=True)
    assert resumed.outcome == "finished"
    assert_same_run(resumed.run_dir, whole.run_dir)
