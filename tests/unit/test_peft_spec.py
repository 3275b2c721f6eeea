"""The PEFT config: the old JSON format, the overrides, and one clear line for every mistake."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from ssm_train.adapters.base import Prepared, Traits
from ssm_train.errors import InputError
from ssm_train.peft.lora import lora_layers
from ssm_train.peft.spec import load_peft

OLD = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 6)
        self.gk_proj = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
        self.conv1d = nn.Conv1d(8, 8, 4, groups=8)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(11, 8)
        self.backbone = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embeddings.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def inject(**settings) -> nn.Module:
    prepared = Prepared(Toy(), None, Traits(lora_targets=("q_proj", "v_proj")))
    load_peft({"peft_type": "LORA", "r": 2} | settings).make().inject(prepared)
    return prepared.model


def adapted(**settings) -> list[str]:
    return [n.removeprefix("base_model.model.") for n in lora_layers(inject(**settings))]


def test_reads_the_old_format(tmp_path):
    path = tmp_path / "lora.json"
    path.write_text(json.dumps(OLD))
    spec = load_peft(str(path), {})
    settings = spec.settings
    assert spec.peft_type == "LORA"
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (8, 16, 0.05)
    assert settings.target_modules == ["q_proj", "v_proj"]
    assert settings.init_lora_weights is True


def test_no_peft_is_full_fine_tuning():
    assert load_peft(None, {"r": 4}) is None


def test_reads_what_peft_itself_writes(tmp_path):
    from peft import LoraConfig

    LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa").save_pretrained(tmp_path)
    settings = load_peft(str(tmp_path / "adapter_config.json"), {}).settings
    assert (settings.r, settings.init_lora_weights) == (4, "pissa")


@pytest.mark.parametrize(
    ("written", "overrides", "expected"),
    [
        ({}, {"r": 3, "lora_alpha": 5.0, "use_dora": True}, (3, 5, True, True)),
        ({}, {"init_lora_weights": "pissa_niter_4"}, (8, 16, False, "pissa_niter_4")),
        ({}, {"init_lora_weights": "True"}, (8, 16, False, True)),
        ({"init_lora_weights": "pissa"}, {"pissa_fast": True}, (8, 16, False, "pissa_niter_4")),
        ({"init_lora_weights": "pissa"}, {"pissa_fast": False}, (8, 16, False, "pissa")),
        ({"init_lora_weights": "olora"}, {"pissa_fast": True}, (8, 16, False, "olora")),
        (
            {"init_lora_weights": "pissa"},
            {"pissa_fast": True, "init_lora_weights": "pissa"},
            (8, 16, False, "pissa"),
        ),
        ({"peft_type": "SD_LORA"}, {"peft_type": "lora"}, (8, 16, False, True)),
        ({}, {"init_lora_weights": "lora_ga", "loraga_steps": 4}, (8, 16, False, "lora_ga")),
    ],
)
def test_overrides_win(written, overrides, expected):
    s = load_peft(OLD | written, overrides).settings
    assert (s.r, s.lora_alpha, s.use_dora, s.init_lora_weights) == expected


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ({"target_module": ["q_proj"]}, {}, r"unknown key 'target_module'.*'target_modules'"),
        ({"peft_type": None}, {}, "peft_type is missing; there is LORA"),
        ({"peft_type": "LORAA"}, {}, r"unknown peft_type 'LORAA'; there is LORA.*'LORA'"),
        ({}, {"peft_type": "sdlra"}, "peft_overrides: unknown peft_type 'sdlra'; there is LORA"),
        ({"use_dora": True}, {"peft_type": "sdlora"}, "use_dora is True, which SD_LORA does not"),
        ({}, {"peft_type": "sdlora", "r": 0}, "proj_lora_r is 0, but"),
        ({"r": "8"}, {}, "r is '8'"),
        ({"r": 0}, {}, "r is 0, but should be greater than or equal to 1"),
        ({}, {"lora_dropout": 1.0}, r"peft_overrides.lora_dropout is 1.0"),
        ({"lora_alpha": 0}, {}, "lora_alpha is 0"),
        ({"init_lora_weights": "pisa"}, {}, "init_lora_weights is 'pisa'.*pissa"),
        ({"init_lora_weights": False}, {}, "init_lora_weights is False"),
        ({"init_lora_weights": "orthogonal", "r": 3}, {}, "needs even ranks"),
        ({"target_modules": []}, {}, "target_modules is"),
        ({"target_modules": "(q_proj"}, {}, "not a regular expression"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, {}, "to be a list"),
        ({"layers_pattern": "layers"}, {}, "without layers_to_transform"),
        ({"rank_pattern": {"q_proj": 0}}, {}, "'q_proj' should be more than 0"),
        ({"alpha_pattern": {"(": 1.0}}, {}, "not a regular expression"),
        ({"lora_bias": True}, {}, "lora_bias is True.*remove it"),
        ({"bias": "all"}, {}, "bias is 'all'.*remove it"),
        (
            {},
            {"loraga_steps": 4},
            "peft_overrides.loraga_steps is 4, .* no effect with init.* True",
        ),
        ({"direction": "legacy"}, {"init_lora_weights": "pissa"}, "direction is 'legacy'.*pissa"),
        ({"init_lora_weights": "lora_ga", "direction": "A2rBr"}, {}, "direction is 'A2rBr'.*ArB2r"),
        ({"init_lora_weights": "lora_ga"}, {"loraga_stable_c": 0.0}, "loraga_stable_c is 0.0"),
        ({"loraplus_lr_ratio": 0}, {}, "loraplus_lr_ratio is 0"),
    ],
)
def test_bad_config_is_one_line(config, overrides, message):
    with pytest.raises(InputError, match=message) as error:
        load_peft(OLD | config, overrides)
    assert "\n" not in str(error.value)


def test_an_override_is_named_by_where_it_was_set():
    places = {"peft_overrides.init_lora_weights": "HP_INIT", "peft_overrides.peft_type": "HP_X"}
    with pytest.raises(InputError, match="^HP_INIT: init_lora_weights is 'pisa'"):
        load_peft(OLD, {"init_lora_weights": "pisa"}, places)
    with pytest.raises(InputError, match="^HP_X: unknown peft_type 'LORRA'"):
        load_peft(OLD, {"peft_type": "LORRA"}, places)
    with pytest.raises(InputError, match="^peft: config file .*nope.json does not exist"):
        load_peft("nope.json")


@pytest.mark.parametrize("changes", [{}, {"use_dora": True, "rank_pattern": {"q_proj": 2}}])
def test_what_is_written_down_reads_back_equal(changes):
    spec = load_peft(OLD | changes, {"r": 4})
    assert load_peft(json.loads(json.dumps(spec.dump()))) == replace(spec, source="peft")


def test_bad_json_names_the_line(tmp_path):
    path = tmp_path / "lora.json"
    path.write_text('{\n "peft_type": "LORA",\n "r" 8\n}')
    with pytest.raises(InputError, match=r"lora.json:3"):
        load_peft(str(path), {})
    with pytest.raises(InputError, match="missing.json"):
        load_peft(str(tmp_path / "missing.json"), {})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 6),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, 2),
        ({"target_modules": ["gk_proj.0", "layers.1.q_proj"]}, 4),
        ({"target_modules": r".*\.2\.(q|v)_proj"}, 2),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.q_proj"]}, 5),
        ({"target_modules": "all-linear"}, 12),
        ({"target_modules": ["lm_head"]}, 1),
    ],
)
def test_targets(settings, expected):
    names = adapted(**settings)
    assert len(names) == expected, names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "'v_prj' matches no module.*'v_proj'"),
        ({"target_modules": ["zzzzz"]}, "linear layers here: q_proj, v_proj, gk_proj.0"),
        ({"target_modules": r".*\.w_proj"}, "matches no module"),
        ({"target_modules": ["conv1d"]}, r"layers.0.conv1d is a convolution of 8 groups"),
        ({"target_modules": ["conv1d"]}, r'full by "modules_to_save": \["conv1d"\]'),
        ({"modules_to_save": ["conv2d"]}, "modules_to_save: 'conv2d' matches no.*'conv1d'"),
        ({"modules_to_save": ["v_proj"]}, "modules_to_save: 'v_proj' is in target_modules too"),
        ({"target_modules": ["gk_proj"]}, "Sequential.*gk_proj.0, gk_proj.1"),
        ({"target_modules": ["embeddings"]}, "is a Embedding"),
        ({"r": 7}, r"r is 7, but backbone.layers.0.v_proj is 6 x 8, of rank 6.*\{\"v_proj\": 6\}"),
        ({"rank_pattern": {"q_proj": 9}}, "r is 9, but backbone.layers.0.q_proj is 8 x 8"),
        ({"rank_pattern": {"k_proj": 2}}, "rank_pattern: 'k_proj' matches no targeted module"),
        ({"alpha_pattern": {"v": 2.0}}, "alpha_pattern: 'v' matches no targeted module"),
        ({"layers_to_transform": [0, 3]}, "layer 3; the model's last layer is 2"),
        ({"layers_to_transform": 3}, "in no layer of layers_to_transform 3"),
        ({"exclude_modules": ["v_proj"]}, "all of 'v_proj' is in exclude_modules"),
        *(
            (
                {"target_modules": ["lm_head"], "init_lora_weights": init},
                "which embeddings shares",
            )
            for init in ("pissa", "lora_ga")
        ),
        (
            {"r": 4, "init_lora_weights": "lora_ga"},
            r"takes 2r = 8 .*layers.0.v_proj is 6 x 8; add rank_pattern \{\"v_proj\": 3\}",
        ),
    ],
)
def test_bad_target_names_the_module_and_changes_nothing(settings, message):
    prepared = Prepared(Toy(), None, Traits(lora_targets=("q_proj", "v_proj")))
    with pytest.raises(InputError, match=message):
        load_peft({"peft_type": "LORA", "r": 2} | settings).make().inject(prepared)
    assert not lora_layers(prepared.model)


def test_patterns_reach_their_modules():
    layers = lora_layers(
        inject(rank_pattern={"layers.1.q_proj": 3}, alpha_pattern={"v_proj": 4}, lora_alpha=1)
    )
    ranks = [layer.r["default"] for layer in layers.values()]
    scalings = [layer.scaling["default"] for layer in layers.values()]
    assert ranks == [2, 2, 3, 2, 2, 2]
    torch.testing.assert_close(scalings, [1 / 2, 4 / 2, 1 / 3, 4 / 2, 1 / 2, 4 / 2])
