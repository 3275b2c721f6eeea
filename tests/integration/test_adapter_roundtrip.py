"""Adapters and merged weights as files: back in a fresh process, on the original stock base."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft_tiny import (
    RANKS,
    inject,
    logits_of,
    make_batch,
    make_rounded_stock,
    make_stock,
    prepare,
    relative_error,
    token_losses,
    tokens,
    train_a_little,
)
from safetensors.torch import load_file, save_file

from ssm_train.adapters.registry import adopt
from ssm_train.errors import InputError
from ssm_train.health.liveness import check_liveness
from ssm_train.peft.export import export_adapter, load_adapter, read_adapter
from ssm_train.peft.lora import lora_layers
from ssm_train.peft.merge import merge_adapter, write_merged

# name -> family, LoRA settings
CASES = {
    "mamba_lora": ("mamba", {}),
    "mamba_pissa": (
        "mamba",
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": RANKS | {"x_proj": 3},
            "alpha_pattern": {"in_proj": 5.5},
        },
    ),
    "mamba_olora_dora": ("mamba", {"init_lora_weights": "olora", "use_dora": True}),
    "mamba2_pissa": ("mamba2", {"init_lora_weights": "pissa_niter_4", "lora_alpha": 3}),
    "gla_dora": ("gla", {"use_dora": True}),
    "gla_pissa": ("gla", {"init_lora_weights": "pissa", "alpha_pattern": {"q_proj": 2}}),
    "gla_olora": ("gla", {"init_lora_weights": "olora", "use_rslora": True}),
    "gla_some_layers": ("gla", {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1}),
}

FRESH = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
import transformers
import fla.models

torch.manual_seed(977)
root = Path(sys.argv[1])
ids = load_file(root / "ids.safetensors")["ids"]

def base_of(case):
    # By name: once fla is imported, Auto classes make its own Mamba out of a Mamba checkpoint.
    library = fla.models if case["family"] == "gla" else transformers
    model_class = getattr(library, case["architecture"])
    return model_class.from_pretrained(root / case["family"], dtype=torch.float32)

cases = json.loads((root / "cases.json").read_text())
for name, case in cases.items():
    if case["ssm_lora"]:
        try:
            PeftModel.from_pretrained(base_of(case), root / name)
        except (KeyError, ValueError) as error:
            assert "SSM_LORA" in str(error), error
        else:
            raise AssertionError(f"{name}: stock PEFT loaded it")

import ssm_train.peft

for name, case in cases.items():
    model = PeftModel.from_pretrained(base_of(case), root / name).eval()
    if not case["ssm_lora"]:
        from ssm_train.adapters.registry import adopt
        adopt(model.get_base_model())  # fla's kernels need a GPU
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    written = load_file(root / name / "adapter_model.safetensors")
    assert loaded.keys() == written.keys(), name
    for key, tensor in written.items():
        assert torch.equal(loaded[key], tensor), (name, key)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = load_file(root / f"{name}.safetensors")["logits"]
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    print(name, error)
    assert error < 1e-5, (name, error)
"""


def export(prepared, method, directory, base_id="someone/base"):
    return export_adapter(
        prepared.model,
        directory,
        base_id=base_id,
        traits=prepared.traits,
        initial=method.initial,
    )


def config_of(directory) -> dict:
    return json.loads((directory / "adapter_config.json").read_text())


def test_fresh_process_with_another_seed(tmp_path):
    ids = tokens(2, 19)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    for family in ("mamba", "mamba2", "gla"):
        make_stock(family).save_pretrained(tmp_path / family)
    cases = {}
    for name, (family, settings) in CASES.items():
        prepared = prepare(family)
        before = logits_of(prepared.model, ids)
        method = inject(prepared, **settings)
        train_a_little(prepared.model)
        logits = logits_of(prepared.model, ids)
        assert relative_error(logits, before) > 1e-2, name  # there is something to get wrong
        export(prepared, method, tmp_path / name, base_id=str(tmp_path / family))
        save_file({"logits": logits}, tmp_path / f"{name}.safetensors")
        ssm_lora = config_of(tmp_path / name)["peft_type"] == "SSM_LORA"
        assert ssm_lora == (name != "gla_some_layers")
        architecture = type(make_stock(family)).__name__
        cases[name] = {"family": family, "architecture": architecture, "ssm_lora": ssm_lora}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    result = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert len(result.stdout.strip().splitlines()) == len(CASES)


def test_inits_that_change_the_base_export_as_plain_lora_of_twice_the_rank(tmp_path):
    prepared = prepare("mamba")
    method = inject(prepared, **CASES["mamba_pissa"][1])
    train_a_little(prepared.model)
    config = config_of(export(prepared, method, tmp_path))
    assert config["init_lora_weights"] is True
    assert config["r"] == 8 and config["rank_pattern"] == {"dt_proj": 4, "x_proj": 6}
    assert config["alpha_pattern"]["in_proj"] == pytest.approx(5.5 * 2**0.5)
    assert config["base_model_name_or_path"] == "someone/base"
    loaded = load_adapter(make_stock("mamba"), tmp_path)
    trained, exported = lora_layers(prepared.model), lora_layers(loaded)
    assert trained.keys() == exported.keys()
    for name, layer in exported.items():
        assert layer.scaling["default"] == pytest.approx(trained[name].scaling["default"])


def test_training_leaves_the_start_and_the_model_alone(tmp_path):
    prepared = prepare("gla")
    method = inject(prepared, init_lora_weights="pissa")
    start = {name: tensor.clone() for name, tensor in method.initial.items()}
    train_a_little(prepared.model)
    assert all(torch.equal(tensor, start[name]) for name, tensor in method.initial.items())
    state = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
    export(prepared, method, tmp_path)
    assert all(torch.equal(t, state[name]) for name, t in prepared.model.state_dict().items())
    assert prepared.model.peft_config["default"].r == 4


def test_untrained_export_is_the_base(tmp_path):
    """[B, -B0] [A; A0] cancels before training, up to the rounding of two equal products."""
    prepared = prepare("gla")
    before = logits_of(prepared.model, tokens(2, 13))
    method = inject(prepared, init_lora_weights="pissa")
    export(prepared, method, tmp_path)
    loaded = load_adapter(make_stock("gla"), tmp_path)
    assert relative_error(logits_of(loaded, tokens(2, 13)), before) < 1e-5


def test_bad_tensors_are_not_exported(tmp_path):
    prepared = prepare("mamba2")
    method = inject(prepared)
    train_a_little(prepared.model)
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    value = trained[0].data[0, 0].item()
    trained[0].data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        export(prepared, method, tmp_path / "bad")
    trained[0].data[0, 0] = value
    for parameter in trained:  # what a sharding engine leaves in the model
        parameter.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="is empty; gather"):
        export(prepared, method, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_bf16_base_gets_the_fp32_adapter_back(tmp_path):
    prepared = prepare("mamba", dtype=torch.bfloat16)
    method = inject(prepared, use_dora=True)
    train_a_little(prepared.model)
    export(prepared, method, tmp_path)
    loaded = PeftModel.from_pretrained(prepare("mamba", dtype=torch.bfloat16).model, tmp_path)
    expected = {n: p for n, p in prepared.model.named_parameters() if "lora_" in n}
    actual = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("family", ["mamba", "gla"])
def test_modules_trained_in_full_come_back_in_fp32(family, tmp_path):
    """On a bf16 base every tensor is the file's, bit for bit."""
    saved = {"mamba": "conv1d", "gla": "lm_head"}[family]
    prepared = prepare(family, dtype=torch.bfloat16)
    method = inject(prepared, modules_to_save=[saved])
    train_a_little(prepared.model)
    export(prepared, method, tmp_path)
    written = read_adapter(tmp_path)
    assert any(saved in name for name in written)
    loaded = load_adapter(prepare(family, dtype=torch.bfloat16).model, tmp_path)
    actual = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert actual.keys() == written.keys()
    for name, tensor in written.items():
        assert actual[name].dtype == torch.float32 and torch.equal(actual[name], tensor), name
    ids = tokens(2, 13)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of(loaded, ids), logits_of(prepared.model, ids))


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_convolution_trained_in_full(family, tmp_path):
    """Beside LoRA on in_proj it is an adapter that stock PEFT loads and that works there."""
    prepared = prepare(family, dtype=torch.bfloat16)
    method = inject(prepared, target_modules=["in_proj"], modules_to_save=["conv1d"])
    trained = [p for n, p in prepared.model.named_parameters() if "conv1d" in n and p.requires_grad]
    assert len(trained) == 4 and all(p.dtype == torch.float32 for p in trained)
    check_liveness(prepared.model.float(), make_batch(), token_losses)
    train_a_little(prepared.model)
    expected = logits_of(prepared.model, tokens(2, 13))
    export(prepared, method, tmp_path)
    assert config_of(tmp_path)["peft_type"] == "LORA"
    stock = PeftModel.from_pretrained(make_rounded_stock(family), tmp_path)
    assert type(stock.get_base_model()).__module__.startswith("transformers.")
    assert relative_error(logits_of(stock, tokens(2, 13)), expected) < 1e-5
    assert (
        relative_error(
            logits_of(load_adapter(make_rounded_stock(family), tmp_path), tokens(2, 13)),
            expected,
        )
        < 1e-5
    )
    merged = merge_adapter(prepared.model, prepared.traits).model
    assert relative_error(logits_of(merged, tokens(2, 13)), expected) < 1e-5
    assert set(merged.state_dict()) == set(make_stock(family).state_dict())


def test_another_implementation_of_the_family_is_refused(tmp_path):
    from fla.models import MambaConfig, MambaForCausalLM

    prepared = prepare("mamba")
    export(prepared, inject(prepared), tmp_path)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    with pytest.raises(InputError, match="is another implementation"):
        PeftModel.from_pretrained(MambaForCausalLM(MambaConfig(**sizes)), tmp_path)


def test_card_and_loading_mistakes(tmp_path):
    prepared = prepare("mamba")
    export(prepared, inject(prepared), tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "base_model: someone/base" in card and "import ssm_train.peft" in card
    with pytest.raises(InputError, match="is not an adapter: it has no adapter_config.json"):
        load_adapter(make_stock("mamba"), tmp_path / "nothing")
    with pytest.raises(InputError, match="does not fit this base model"):
        load_adapter(make_stock("mamba2"), tmp_path / "adapter")
    other = make_stock("mamba", time_step_rank=4)
    with pytest.raises(InputError, match="does not fit this base model: .*size mismatch"):
        load_adapter(other, tmp_path / "adapter")
    other = make_stock("mamba")
    other.config._name_or_path = "someone/else"
    with pytest.raises(InputError, match="for someone/base, and this model is someone/else; load"):
        load_adapter(other, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(next(name for name in tensors if "out_proj" in name))
    save_file(tensors, weights)
    with pytest.raises(InputError, match="1 tensors are in only one"):
        load_adapter(make_stock("mamba"), tmp_path / "adapter")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        load_adapter(make_stock("mamba"), tmp_path / "adapter")


def test_another_revision_of_the_base_is_refused(tmp_path):
    prepared = prepare("mamba")
    method = inject(prepared)
    export_adapter(
        prepared.model, tmp_path, base_id="someone/base", traits=prepared.traits,
        initial=method.initial, revision="a" * 40,
    )  # fmt: skip
    model = make_stock("mamba")
    for commit in (None, "a" * 40):
        model.config._commit_hash = commit
        load_adapter(model, tmp_path).unload()
    model.config._commit_hash = "b" * 40
    with pytest.raises(InputError, match="trained on revision a{40} of someone/base, and this"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mamba_pissa", "mamba_olora_dora", "mamba2_pissa", "gla_dora"])
def test_merged_weights_load_without_us(name, dtype, tmp_path):
    family, settings = CASES[name]
    prepared = prepare(family, dtype=dtype)
    inject(prepared, **settings)
    # A thousandth of a bf16 step of the weights: rounding to bf16 would lose all of it.
    train_a_little(prepared.model, scale=0.1 if dtype == torch.float32 else 1e-4)
    ids = tokens(2, 13)
    expected = logits_of(prepared.model.float(), ids)
    merged = merge_adapter(prepared.model, prepared.traits)
    assert merged.difference < 1e-5 and merged.ssm_lora
    write_merged(merged, tmp_path, base_id="someone/base")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["architectures"] == [type(make_stock(family)).__name__]
    stock = type(make_stock(family)).from_pretrained(tmp_path)
    names = set(stock.state_dict())
    assert names == set(make_stock(family).state_dict())
    if family == "gla":
        adopt(stock)  # fla's kernels need a GPU
    assert relative_error(logits_of(stock, ids), expected) < 1e-5
    assert f"{merged.difference:.1e}" in (tmp_path / "README.md").read_text()


def test_merging_a_tied_head_leaves_the_embedding(tmp_path):
    prepared = prepare("mamba", tie_word_embeddings=True)
    model = prepared.model
    assert model.lm_head.weight is model.backbone.embeddings.weight
    embedding = model.backbone.embeddings.weight.detach().clone()
    inject(prepared, target_modules=["lm_head", "in_proj"])
    train_a_little(prepared.model)
    expected = logits_of(prepared.model, tokens(2, 13))
    merged = merge_adapter(prepared.model, prepared.traits)
    assert torch.equal(merged.model.backbone.embeddings.weight, embedding)
    write_merged(merged, tmp_path, base_id="someone/base")
    stock = type(make_stock("mamba")).from_pretrained(tmp_path)
    assert relative_error(logits_of(stock, tokens(2, 13)), expected) < 1e-5


def test_merge_refuses_what_changes_the_function():
    prepared = prepare("mamba")
    inject(prepared)
    train_a_little(prepared.model)
    with pytest.raises(InputError, match="more than the tolerance 0.0e"):
        merge_adapter(prepared.model, prepared.traits, tolerance=0.0)
    prepared = prepare("mamba")
    inject(prepared)
    with torch.no_grad():
        next(p for p in prepared.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(InputError, match="cannot be merged"):
        merge_adapter(prepared.model, prepared.traits)
