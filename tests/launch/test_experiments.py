"""The experiments' configs are those of the table, and a name means what it says."""

import json
from pathlib import Path

import pytest

from ssm_train.errors import InputError
from ssm_train.launch.experiments import find_differences, main, make_files, read_name, write_files
from ssm_train.strict_yaml import parse_yaml

CHECKED_IN = Path(__file__).parents[2] / "cfg" / "my_lora_exp"
QKVO = ["attn.k_proj", "attn.o_proj", "attn.q_proj", "attn.v_proj"]
G, GK = "attn.g_proj", ["attn.gk_proj.0", "attn.gk_proj.1"]
MLP = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]


def lora(targets: list[str], r: int = 8, alpha: int = 16, **others: object) -> dict[str, object]:
    kind = {"peft_type": "LORA", "bias": "none", "task_type": "CAUSAL_LM"}
    sizes = {"r": r, "lora_alpha": alpha, "lora_dropout": 0.05, "target_modules": targets}
    return kind | sizes | others


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_the_files_are_those_of_the_table(tmp_path: Path) -> None:
    write_files(tmp_path)
    made, there = contents(tmp_path), contents(CHECKED_IN)
    assert made.keys() == there.keys()
    assert not [name for name in made if made[name] != there[name]]
    assert 80 <= sum(name.startswith("yaml/") for name in made) <= 110


def test_check_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--directory", str(tmp_path)]
    assert main([*command, "--check"]) == 1
    assert f"{tmp_path}/suites.yaml is missing\n" in capsys.readouterr().out
    assert not contents(tmp_path)
    assert main(command) == main([*command, "--check"]) == 0
    assert capsys.readouterr().out == ""

    changed = tmp_path / "yaml" / "E1_QKVO_r8_alpha16.yaml"
    changed.write_bytes(changed.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "peft" / "lora_qkvo_alpha2r_r8_a16.json").unlink()
    (tmp_path / "yaml" / "mine.yaml").write_text("data: my.jsonl\n")
    expected = [
        f"{tmp_path}/peft/lora_qkvo_alpha2r_r8_a16.json is missing",
        f"{tmp_path}/yaml/E1_QKVO_r8_alpha16.yaml differs from the table",
        f"{tmp_path}/yaml/mine.yaml is not in the table; remove it",
    ]
    assert main([*command, "--check"]) == 1
    assert capsys.readouterr().out.splitlines() == expected
    assert main(command) == 1  # what the table does not make, it does not remove
    assert find_differences(tmp_path) == ["yaml/mine.yaml is not in the table; remove it"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("E1_QKVO_r8_alpha16", lora(QKVO)),
        ("E1_QKVO_R16_r16_alpha16", lora(QKVO, 16)),
        ("QKVO_plus_G_r16_a16", lora([G, *QKVO], 16)),
        ("QKVO_plus_G_RSLoRA_r8_a8", lora([G, *QKVO], 8, 8, use_rslora=True)),
        (
            "E1_QKVO_plus_G_plus_GK_DORA_r8_alpha8",
            lora([G, *GK, *QKVO], 8, 8, use_dora=True),
        ),
        ("E2_OMLP_plus_G_r8_a8", lora([G, "attn.o_proj", *MLP], 8, 8)),
        ("E1_QKVO_dropout0_r8_alpha16", lora(QKVO, lora_dropout=0.0)),
        ("E1_QKVO_first6_r8_alpha16", lora(QKVO, layers_to_transform=[0, 1, 2, 3, 4, 5])),
        ("E1_QKVO_last6_r8_alpha8", lora(QKVO, 8, 8, layers_to_transform=[*range(18, 24)])),
        (
            "E2_OMLP_middle6_r8_alpha16",
            lora(["attn.o_proj", *MLP], layers_to_transform=[*range(9, 15)]),
        ),
        (
            "round4_RSLORA_QKVO_plus_GK_r8_a16_seed127",
            lora([*GK, *QKVO], use_rslora=True),
        ),
        ("E8_QK_plus_GATING_r8_alpha16", lora([G, *GK, "attn.k_proj", "attn.q_proj"])),
        ("E9_OplusHEAD_DoRA_r8_alpha16", lora(["attn.o_proj", "lm_head"], use_dora=True)),
        ("E11_OONLY_r8_alpha16", lora(["attn.o_proj"])),
        ("E7_GKONLY_r8_alpha16", lora(GK)),
        (
            "E3_QKVO_main_Gates_aux_r8a16_r4a8",
            lora(
                [G, *GK, *QKVO],
                rank_pattern=dict.fromkeys([G, *GK], 4),
                alpha_pattern=dict.fromkeys([G, *GK], 8),
            ),
        ),
        (
            "E3_QKVO_main_Gates_aux_RSLoRA_r8a16_r2a2",
            lora(
                [G, *GK, *QKVO],
                use_rslora=True,
                rank_pattern=dict.fromkeys([G, *GK], 2),
                alpha_pattern=dict.fromkeys([G, *GK], 2),
            ),
        ),
        (
            "E3_QKVO_plus_G_only_r4a4",
            lora([G, *QKVO], rank_pattern={G: 4}, alpha_pattern={G: 4}),
        ),
    ],
)
def test_a_name_says_what_is_adapted(name: str, expected: dict[str, object]) -> None:
    assert read_name(name).lora == expected


@pytest.mark.parametrize(
    ("name", "unlike"),
    [
        ("E1_QKVO_r8_alpha16", {}),
        ("E1_QKVO_lr2e-4_r8_alpha16", {"learning_rate": 2e-4}),
        ("E1_QKVO_lr5e-5_r8_alpha16", {"learning_rate": 5e-5}),
        ("E1_QKVO_wd0.01_r8_alpha16", {"weight_decay": 0.01}),
        ("E1_QKVO_loradrop0.05_r8_alpha16", {}),
        (
            "E1_QKVO_dropout0_r8_alpha16",
            {"peft": "cfg/my_lora_exp/peft/lora_QKVO_dropout0_r8_alpha16.json"},
        ),
        (
            "round4_QKVO_plus_GK_r8_a16_seed127",
            {
                "seed": 127,
                "peft": "cfg/my_lora_exp/peft/lora_round4_QKVO_plus_GK_r8_a16_seed127.json",
            },
        ),
    ],
)
def test_a_name_says_how_it_is_trained(name: str, unlike: dict[str, object]) -> None:
    base = {
        "model": "fla-hub/gla-1.3B-100B",
        "data": "glue-tvt_cola",
        "batch_size": 4,
        "num_epochs": 10,
        "learning_rate": 3e-4,
        "prec": "bf16",
        "no_save": False,
        "peft": "cfg/my_lora_exp/peft/lora_qkvo_alpha2r_r8_a16.json",
    }
    files = make_files()
    document = parse_yaml(files[f"yaml/{name}.yaml"], name)
    assert document.values == base | unlike
    peft = str(document.values["peft"]).removeprefix("cfg/my_lora_exp/")
    assert json.loads(files[peft]) == read_name(name).lora


@pytest.mark.parametrize(
    "name",
    [
        "E1_QKVO_r8",
        "E1_QKVO_alpha16",
        "E1_QKVO_Dora_r8_alpha16",
        "E1_QKVP_r8_alpha16",
        "E1_OVKQ_r8_alpha16",
        "E1_ONLY_r8_alpha16",
        "E1_QKVO_G_r8_alpha16",
        "E1_QKVO_plus_X_r8_alpha16",
        "E1_QKVO_plus_G_only_r8a16_r4a4",
        "E1_QKVO_R16_r8_alpha16",
        "E3_QKVO_main_Gates_aux_r8a16",
        "E3_QKVO_main_gates_aux_r8a16_r4a4",
        "E1_QKVO_first7_r8_alpha16",
    ],
)
def test_a_name_without_a_meaning_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match="experiment|group") as error:
        read_name(name)
    assert "\n" not in str(error.value)


def test_suites() -> None:
    suites = parse_yaml(make_files()["suites.yaml"], "suites").values
    assert list(suites) == [f"E{n}" for n in range(1, 11)]
    for names in suites.values():
        assert names and len(names) == len(set(names))
    assert len(suites["E1"]) == 59
    assert suites["E1"][:5] == [
        "E1_QKVO_r8_alpha16",
        "E1_QKVO_r8_alpha8",
        "E1_QKVO_r10_alpha16",
        "E2_OMLP_r8_alpha16",
        "E1_QKVO_r8_alpha12",
    ]
    assert suites["E1"][-3:] == [
        "E9_OplusHEAD_r8_alpha16",
        "E9_OplusHEAD_DoRA_r8_alpha16",
        "E9_OplusHEAD_RSLoRA_r8_alpha16",
    ]
    assert suites["E4"] == [
        "round4_QKVO_r8_a16_seed127",
        "round4_QKVO_plus_GK_r8_a16_seed127",
        "round4_DoRA_QKVO_r8_a16_seed127",
        "round4_DoRA_QKVO_plus_GK_r8_a16_seed127",
        "round4_RSLORA_QKVO_r8_a16_seed127",
        "round4_RSLORA_QKVO_plus_GK_r8_a16_seed127",
    ]
    in_suites = {f"yaml/{name}.yaml" for names in suites.values() for name in names}
    assert in_suites == {name for name in make_files() if name.startswith("yaml/")}
