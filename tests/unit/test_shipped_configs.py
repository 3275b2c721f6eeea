"""Every config in cfg/ can be read, and its PEFT targets are modules of its model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssm_train.adapters import registry
from ssm_train.adapters.base import Batch, ModelSpec, Prepared
from ssm_train.config import RunConfig, load_config, run_directory
from ssm_train.data.sources import find_task, load_task_data, training_texts
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.health.liveness import check_liveness
from ssm_train.peft.coverage import measure_coverage
from ssm_train.peft.lora import LoraSettings, lora_layers
from ssm_train.peft.spec import load_peft
from ssm_train.peft.targets import match_targets, resolve_targets
from ssm_train.peft.tuner import own_layers

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "cfg").rglob("*")
    if path.suffix in (".yaml", ".yml", ".json") and path.name != "suites.yaml"
)
EXPERIMENTS = [path for path in CONFIGS if path.startswith("cfg/my_lora_exp/yaml/")]
# Runs whose model is another run's: they need no download.
ON_OUR_BASES = [
    f"cfg/{directory}/{family}_lora.yaml"
    for directory in ("dart", "quickstart", "sst2")
    for family in ("gla", "mamba")
]


def read(path: str) -> RunConfig:
    return load_config(path)[0]


def base_of(cfg: RunConfig) -> RunConfig:
    """The run that makes the model which `cfg` starts from."""
    assert cfg.model is not None
    return read(cfg.model)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # configs name one another from there


@pytest.mark.parametrize("path", CONFIGS)
def test_a_config_reads(path: str) -> None:
    cfg = read(path)
    load_peft(cfg.peft, cfg.peft_overrides.given())
    if isinstance(cfg.tokenizer, dict):
        build_tokenizer(["a text"], cfg.tokenizer)
    if cfg.task is not None:
        find_task(cfg)


@pytest.mark.parametrize("path", CONFIGS)
def test_a_config_names_no_machine(path: str) -> None:
    cfg = read(path)
    named = [cfg.data, cfg.val_data, cfg.test_data, cfg.model, cfg.output_root]
    assert not [name for name in named if name and Path(name).is_absolute()]


def test_every_run_has_a_directory_of_its_own() -> None:
    runs = [path for path in CONFIGS if not path.endswith(".json")]
    assert len({run_directory(read(path), path) for path in runs}) == len(runs) >= 8


@pytest.mark.parametrize("path", ON_OUR_BASES)
def test_lora_reaches_every_projection(
    path: str, tmp_path: Path, write_tokenizer: Callable[..., None]
) -> None:
    cfg = read(path)
    write_tokenizer(tmp_path)
    spec = ModelSpec(new_model=base_of(cfg).new_model, tokenizer=str(tmp_path))
    adapter, _ = registry.resolve(spec)
    prepared = adapter.prepare(spec)
    peft = load_peft(cfg.peft, cfg.peft_overrides.given())
    assert peft is not None
    peft.make().inject(prepared)  # raises for a name that matches nothing
    coverage = measure_coverage(prepared.model)
    assert coverage.adapted == coverage.linear_layers > 0


@pytest.mark.parametrize("path", ["cfg/sst2/gla_lora.yaml", "cfg/sst2/mamba_lora.yaml"])
def test_the_base_knows_the_label_words(path: str, tmp_path: Path) -> None:
    """The tokenizer is the base's: it must have the words of a task that it was not built for."""
    records = [{"sentence": "a fine film", "label": 1}, {"sentence": "a dull one", "label": 0}]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    cfg = read(path).model_copy(update={"data": str(data)})
    base = base_of(cfg).model_copy(update={"data": str(data)})
    assert isinstance(base.tokenizer, dict)
    tokenizer = build_tokenizer(training_texts(base), base.tokenizer)
    examples = load_task_data(cfg, tokenizer, "train")
    words = tokenizer.convert_ids_to_tokens([int(i) for i in examples.class_ids])
    assert words == ["0", "1"]
    prompts = [i for n in range(len(examples)) for i in examples.prompt_ids(n).tolist()]
    assert tokenizer.unk_token_id not in prompts


# ---------------------------------------------------------------- LoRA configs on their models

# Part of an experiment's name -> adapted projections in each layer, and in the whole model beside;
# the longest part that a name holds counts.
PROJECTIONS = {
    "QKVO": (4, 0),
    "QKVO_plus_G": (5, 0),
    "QKVO_plus_GK": (6, 0),
    "QKVO_plus_G_plus_GK": (7, 0),
    "QKVO_plus_MLP": (7, 0),
    "QKVO_plus_G_plus_GK_plus_MLP": (10, 0),
    "QKVO_plus_HEAD": (4, 1),
    "QKVO_main_Gates_aux": (7, 0),
    "QKVO_main_MLP_aux": (7, 0),
    "QKVO_main_GatesMLP_aux": (10, 0),
    "OMLP": (4, 0),
    "OMLP_plus_G": (5, 0),
    "OMLP_plus_GK": (6, 0),
    "OMLP_plus_G_plus_GK": (7, 0),
    "QK_plus_GATING": (5, 0),
    "GATINGONLY": (3, 0),
    "GONLY": (1, 0),
    "GKONLY": (2, 0),
    "MLPONLY": (3, 0),
    "HEADONLY": (0, 1),
    "OplusHEAD": (1, 1),
    "QKV": (3, 0),
    **dict.fromkeys(("QONLY", "KONLY", "VONLY", "OONLY"), (1, 0)),
    **dict.fromkeys(("QKONLY", "QVONLY", "QOONLY", "KVONLY", "KOONLY", "VOONLY"), (2, 0)),
}
# JSONs for `--cfg` by themselves -> the family that has such modules, adapted projections a layer.
BARE = {
    "cfg/peft/lora/lora_qkvo_r8_a16.json": ("gla", 4),
    "cfg/peft/lora/lora_in_out_proj_r8_a16.json": ("mamba", 2),
    "cfg/peft/lora/lora_in_x_dt_out_proj_r8_a16.json": ("mamba", 4),
    "cfg/peft/lora/lora_plus_in_out_proj_r8_a16.json": ("mamba", 2),
    "cfg/peft/lora/lora_ga_in_out_proj_r8_a16.json": ("mamba", 2),
    "cfg/peft/lora/lora_ga_qkvo_r8_a16.json": ("gla", 4),
    **{
        f"cfg/peft/lora/{name}_in_out_proj_r8_a16.json": ("mamba", 2)
        for name in ("rslora", "dora", "pissa", "pissa_niter_4", "olora")
    },
    "cfg/peft/lora/lora_slices_x_B_C_r8_a16.json": ("mamba", 3),
}
# The same for our own methods: the places a layer where they sit.
OWN = {
    "cfg/peft/bitfit/bitfit.json": ("mamba", 2),
    "cfg/peft/bitfit/bitfit_in_out_proj.json": ("mamba", 4),
    "cfg/peft/layer_freeze/ssm.json": ("mamba", 4),
    "cfg/peft/layer_freeze/gla_gates.json": ("gla", 3),
    "cfg/peft/ssmpeft/init_state.json": ("mamba", 1),
    "cfg/peft/ssmpeft/init_state_conv.json": ("mamba", 2),
    "cfg/peft/ssmpeft/init_state_hidden_4.json": ("mamba", 1),
    "cfg/peft/state_offset/state_offset.json": ("mamba", 1),
    "cfg/peft/state_offset/state_offset_r4.json": ("mamba", 1),
    "cfg/peft/state_offset/output.json": ("mamba", 1),
    "cfg/peft/sd_lora/500it_n0.75_d0.99.json": ("mamba", 2),
    "cfg/peft/sd_lora/250it_n0.95_d0.99.json": ("mamba", 3),
    "cfg/peft/sd_lora/sdt_alone.json": ("mamba", 1),
    "cfg/peft/gla_sd_lora/r8_train0.4_zero0.1.json": ("gla", 5),
    "cfg/peft/additional_scan/states_6.json": ("mamba", 1),
    "cfg/peft/affix_tuning/affix_1.json": ("mamba", 1),
    "cfg/peft/param_transform/scale_n.json": ("mamba", 2),
    "cfg/peft/param_transform/scale_bias_dn_r4.json": ("mamba", 2),
}
SIZES: dict[str, dict[str, Any]] = {
    "gla": {"num_hidden_layers": 24, "num_heads": 2, "intermediate_size": 48},  # as many as 1.3B
    "mamba": {"num_hidden_layers": 2, "state_size": 16, "time_step_rank": 8},
}


@pytest.fixture(scope="module")
def bare_models() -> dict[str, Prepared]:
    """Tiny models of the families, as an adapter prepares them; nothing may be injected here."""
    from fla.models.gla import GLAConfig, GLAForCausalLM
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    classes = {"gla": (GLAForCausalLM, GLAConfig), "mamba": (MambaForCausalLM, MambaConfig)}
    models = {}
    for family, (model_class, config_class) in classes.items():
        model = model_class(config_class(hidden_size=32, vocab_size=61, **SIZES[family])).eval()
        registry.adopt(model)
        models[family] = Prepared(model, None, registry.FAMILIES[family]()[0].traits)
    return models


def settings_of(path: str) -> LoraSettings:
    cfg = read(path)
    peft = load_peft(cfg.peft, cfg.peft_overrides.given())
    assert peft is not None and isinstance(peft.settings, LoraSettings)
    return peft.settings


def adapted_modules(prepared: Prepared, settings: LoraSettings) -> list[str]:
    """What the config reaches, after all checks; raises for a name that matches nothing."""
    targets = resolve_targets(prepared.model, prepared.traits, settings)
    return sum(match_targets(prepared.model, targets, settings).values(), [])


def injected(prepared: Prepared, path: str) -> Prepared:
    """A copy with the config's LoRA."""
    copied = Prepared(copy.deepcopy(prepared.model), None, prepared.traits)
    peft = load_peft(read(path).peft)
    assert peft is not None
    peft.make().inject(copied)
    return copied


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_an_experiment_adapts_what_its_name_says(
    path: str, bare_models: dict[str, Prepared]
) -> None:
    cfg, settings = read(path), settings_of(path)
    assert registry.choose_family(ModelSpec(model=cfg.model))[0] == "gla"
    name = cfg.name or ""
    part = max((part for part in PROJECTIONS if f"_{part}_" in f"_{name}"), key=len)
    layers = 6 if any(word in name for word in ("first6", "middle6", "last6")) else 24
    in_layer, beside = PROJECTIONS[part]
    found = adapted_modules(bare_models["gla"], settings)
    assert len(found) == len(set(found)) == in_layer * layers + beside
    assert settings.use_dora == ("dora" in name.lower())
    assert settings.use_rslora == ("rslora" in name.lower())


def test_every_part_of_a_name_occurs() -> None:
    names = [f"_{Path(path).stem}" for path in EXPERIMENTS]
    assert not [part for part in PROJECTIONS if not any(f"_{part}_" in name for name in names)]


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.startswith("cfg/peft/")])
def test_a_bare_json_fits_its_family(path: str, bare_models: dict[str, Prepared]) -> None:
    family, in_layer = (BARE | OWN)[path]
    if path in OWN:
        found = list(own_layers(injected(bare_models[family], path).model))
    else:
        copied = copy.deepcopy(bare_models[family])  # slices cut the model
        found = adapted_modules(copied, settings_of(path))
    assert len(found) == in_layer * SIZES[family]["num_hidden_layers"]
    cfg = read(path)
    assert cfg.model is not None and family in cfg.model  # of the default run that it gets


@pytest.mark.parametrize(
    ("word", "layers"), [("first6", range(6)), ("middle6", range(9, 15)), ("last6", range(18, 24))]
)
def test_layers_of_a_name(word: str, layers: range, bare_models: dict[str, Prepared]) -> None:
    paths = [path for path in EXPERIMENTS if word in path]
    assert paths
    for path in paths:
        found = adapted_modules(bare_models["gla"], settings_of(path))
        assert {int(name.split(".")[2]) for name in found} == set(layers)


G, GK, MLP = ("g_proj",), ("gk_proj.0", "gk_proj.1"), ("gate_proj", "up_proj", "down_proj")
GATES = (*G, *GK)


@pytest.mark.parametrize(
    ("name", "aux", "r", "scaling"),
    [
        ("E3_QKVO_main_Gates_aux_r8a16_r2a2", GATES, 2, 2 / 2),
        ("E3_QKVO_main_Gates_aux_r8a16_r4a8", GATES, 4, 8 / 4),
        ("E3_QKVO_main_MLP_aux_r8a16_r4a8", MLP, 4, 8 / 4),
        ("E3_QKVO_main_GatesMLP_aux_r8a16_r4a8", (*GATES, *MLP), 4, 8 / 4),
        ("E3_QKVO_main_Gates_aux_RSLoRA_r8a16_r4a4", GATES, 4, 4 / 4**0.5),
        ("E3_QKVO_main_Gates_aux_DoRA_r8a16_r4a4", GATES, 4, 4 / 4),
        ("E3_QKVO_plus_G_only_r4a4", G, 4, 4 / 4),
        ("E3_QKVO_plus_GK_only_r4a4", GK, 4, 4 / 4),
    ],
)
def test_mixed_ranks_reach_their_modules(
    name: str,
    aux: tuple[str, ...],
    r: int,
    scaling: float,
    bare_models: dict[str, Prepared],
) -> None:
    model = injected(bare_models["gla"], f"cfg/my_lora_exp/yaml/{name}.yaml").model
    main = (8, 16 / 8**0.5 if "RSLoRA" in name else 16 / 8)
    expected = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), main)
    expected |= dict.fromkeys(aux, (r, scaling))
    layers = lora_layers(model)
    assert len(layers) == 24 * len(expected)
    for module, layer in layers.items():
        end = ".".join(module.split(".")[-2:]) if module[-1].isdigit() else module.split(".")[-1]
        assert layer.lora_A["default"].weight.shape[0] == layer.r["default"] == expected[end][0]
        assert layer.scaling["default"] == pytest.approx(expected[end][1])
        assert layer.use_dora["default"] == ("DoRA" in name)


@pytest.mark.parametrize(
    "name",
    ["E9_QKVO_plus_HEAD_r8_alpha16", "E9_OplusHEAD_DoRA_r8_alpha16"]
    + ["E3_QKVO_main_GatesMLP_aux_r8a16_r4a8", "E2_OMLP_middle6_r8_alpha16"],
)
def test_nothing_is_dead(name: str, bare_models: dict[str, Prepared]) -> None:
    """The preflight of a run passes: every factor of every adapted layer has a gradient."""
    model = injected(bare_models["gla"], f"cfg/my_lora_exp/yaml/{name}.yaml").model
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = Batch(
        input_ids=ids,
        target_positions=torch.arange(18).view(2, 9)[:, :-1].flatten(),
        targets=ids[:, 1:].flatten(),
        sequence_ids=torch.arange(2)[:, None].expand(2, 9),
        position_ids=torch.arange(9).expand(2, 9),
    )
    check_liveness(model, batch, registry.FAMILIES["gla"]()[0].token_losses)
