"""Run configs: layers, where each value came from, round trips, run directories."""

import json
from pathlib import Path
from typing import Any

import pytest

from ssm_train.config import (
    PeftOverrides,
    RunConfig,
    describe_overrides,
    dump_yaml,
    load_config,
    run_directory,
)
from ssm_train.errors import InputError
from ssm_train.explain import expected
from ssm_train.overrides import DIRECTORIES, ENVIRONMENT, NO_LONGER_READ, unread_variables

BASE = "data: quickstart\nnew_model: {model_type: gla}\n"


def write(directory: Path, text: str, name: str = "run.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def load(directory: Path, text: str = "", **layers: Any) -> tuple[RunConfig, dict[str, str]]:
    return load_config(
        write(directory, BASE + text), layers.get("command_line"), layers.get("environment")
    )


def test_old_keys_keep_their_defaults(tmp_path: Path) -> None:
    cfg, _ = load(tmp_path)
    kept = {
        "tokenizer": None,  # the checkpoint's own, else EleutherAI/gpt-neox-20b
        "val_data": None,
        "val_data_split": "val",
        "num_epochs": 10,
        "prec": "bf16",
        "peft": None,
        "optim": "adamw_torch",
        "learning_rate": 5e-4,
        "seed": 42,
        "gradient_accumulation_steps": 1,
        "num_data_workers": 8,
        "batch_size": 4,
        "eval_gen": None,
        "backend": "cuda",
        "debug": False,
        "resume": False,
        "overwrite": False,
        "lock": False,
        "no_save": False,
        "skip_eval": False,
        "eval_epochs": 1,
        "min_eval_metric_after_epoch": {},
        "logits_to_keep": None,
        "gradient_checkpointing": False,
        "weight_decay": 0,
        "max_grad_norm": 1.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "warmup_steps": 0,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0,
        "max_steps": None,
        "logging_steps": None,
        "eval_steps": None,
        "save_steps": None,
        "eval_batch_size": None,
        "max_length": None,
        "output_root": "output/benchmark",
    }
    assert {key: getattr(cfg, key) for key in kept} == kept


def test_file_then_command_line_then_environment(tmp_path: Path) -> None:
    cfg, provenance = load(
        tmp_path,
        "learning_rate: 1e-3\nbatch_size: 8\nseed: 1\n",
        command_line={"batch_size": "16", "seed": "2"},
        environment={"HP_SEED": "3", "HP_LR": "", "UNRELATED": "x"},
    )
    assert (cfg.learning_rate, cfg.batch_size, cfg.seed) == (1e-3, 16, 3)
    assert provenance["learning_rate"].endswith("run.yaml:3")
    assert provenance["batch_size"] == "command line"
    assert provenance["seed"] == "HP_SEED"
    assert provenance["num_epochs"] == "default"


def test_every_value_that_is_not_a_default_is_described(tmp_path: Path) -> None:
    cfg, provenance = load(
        tmp_path,
        "peft: lora.json\n",
        command_line={"eval_gen": "{num_beams: 4}"},
        environment={"HP_PEFT_R": "16"},
    )
    lines = describe_overrides(cfg, provenance)
    assert len(lines) == 5
    assert lines[-2:] == [
        'eval_gen = {"num_beams": 4}  (command line)',
        "peft_overrides.r = 16  (HP_PEFT_R)",
    ]


VARIABLES = {
    "HP_DATA": ("rte", "glue-tvt_rte"),
    "HP_VAL_SPLIT": ("test", "test"),
    "HP_BATCH_SIZE": ("16", 16),
    "HP_EVAL_BATCH_SIZE": ("32", 32),
    "HP_TOKENS_PER_BATCH": ("16384", 16384),  # another number needs packing
    "HP_LR": ("2e-5", 2e-5),
    "HP_EPOCHS": ("0.5", 0.5),
    "HP_PREC": ("fp32", "fp32"),
    "HP_SEED": ("7", 7),
    "HP_MAX_STEPS": ("100", 100),
    "HP_LOGGING_STEPS": ("5", 5),
    "HP_EVAL_STEPS": ("20", 20),
    "HP_SAVE_STEPS": ("30", 30),
    "NUM_DATA_WORKERS": ("0", 0),
    "GRADIENT_CHECKPOINTING": ("1", True),
    "LOGITS_TO_KEEP": ("1", 1),
    "LR_SCHEDULER_TYPE": ("cosine", "cosine"),
    "LR_WARMUP_STEPS": ("10", 10),
    "LR_WARMUP_RATIO": ("0.25", 0.25),
    "HP_PEFT_R": ("16", 16),
    "HP_PEFT_ALPHA": ("32", 32),
    "HP_PEFT_DROPOUT": ("0.05", 0.05),
    "HP_INIT": ("pissa_niter_4", "pissa_niter_4"),
    "HP_PISSA_FAST": ("true", True),
    "HP_USE_DORA": ("yes", True),
    "HP_USE_RSLoRA": ("0", False),
    "HP_PEFT_TYPE": ("sdlora", "sdlora"),
    "HP_LORAGA_BATCH_SIZE": ("2", 2),
    "HP_LORAGA_STEPS": ("3", 3),
    "HP_LORAGA_LAYERWISE": ("on", True),
    "HP_LORAGA_STABLE_C": ("1.5", 1.5),
    "HP_WARMUP_IT": ("500", 500),
    "HP_TRAIN_RATIO": ("0.4", 0.4),
    "HP_FREEZE_RATIO": ("0.5", 0.5),
    "HP_ZERO_RATIO": ("0.1", 0.1),
}


@pytest.mark.parametrize("variable", ENVIRONMENT)
def test_every_variable_reaches_its_key(tmp_path: Path, variable: str) -> None:
    text, value = VARIABLES[variable]
    cfg, provenance = load(tmp_path, "peft: lora.json\n", environment={variable: text})
    key = ENVIRONMENT[variable]
    found: Any = cfg
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert provenance[key] == variable


@pytest.mark.parametrize("short", ["rte", "cola", "mrpc", "sst2", "qnli", "qqp", "mnli", "wnli"])
def test_short_names_of_glue(tmp_path: Path, short: str) -> None:
    for text, data in ((short, f"glue-tvt_{short}"), (f"glue-tvt_{short}_300",) * 2):
        assert load(tmp_path, environment={"HP_DATA": text})[0].data == data


def test_other_short_names(tmp_path: Path) -> None:
    for text, data in {"spider": "spider-tvt", "cifar": "cifar-tvt", "dart": "dart"}.items():
        assert load(tmp_path, environment={"HP_DATA": text})[0].data == data
    assert load(tmp_path, command_line={"data": "rte"})[0].data == "rte"


def test_variables_that_nothing_reads_are_named() -> None:
    environment = {"EVAL_GEN_MAX_LENGTH": "128", "HP_OTHER": "1", "HP_NO_SAVE": " ", "HOME": "/"}
    environment |= dict.fromkeys([*ENVIRONMENT, *DIRECTORIES], "1")
    assert list(unread_variables(environment)) == [
        "EVAL_GEN_MAX_LENGTH is set, but not read; set eval_gen.max_length instead",
        "HP_OTHER is set, but not read",
    ]
    keys = {key.partition(".")[0] for key in NO_LONGER_READ.values()}
    assert keys <= set(RunConfig.model_fields)


def test_every_peft_override_has_a_variable() -> None:
    reached = {key.removeprefix("peft_overrides.") for key in ENVIRONMENT.values()}
    assert set(PeftOverrides.model_fields) <= reached


def test_given_overrides_only(tmp_path: Path) -> None:
    cfg, _ = load(
        tmp_path,
        "peft: lora.json\n",
        environment={"HP_PEFT_R": "4", "HP_INIT": "true", "HP_USE_DORA": "0"},
    )
    assert cfg.peft_overrides.given() == {"r": 4, "init_lora_weights": True, "use_dora": False}


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-4", 5e-4), ("1E3", 1000.0), ("1", 1.0), (".5", 0.5), ("+1.5", 1.5), ("1_0.5", 10.5)],
)
def test_numbers_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    assert load(tmp_path, f"learning_rate: {text}\n")[0].learning_rate == value


def test_words_stay_words(tmp_path: Path) -> None:
    cfg, _ = load(tmp_path, "task: {labels: {0: no, 1: yes}, on: 2026-01-01, at: 1:30, o: 010}\n")
    assert cfg.task == {
        "labels": {0: "no", 1: "yes"}, "on": "2026-01-01", "at": "1:30", "o": "010",
    }  # fmt: skip


def test_command_line_text_stays_text_where_text_is_meant(tmp_path: Path) -> None:
    cfg, _ = load(tmp_path, command_line={"val_data": "007", "name": "1e4", "revision": "null"})
    assert (cfg.val_data, cfg.name, cfg.revision) == ("007", "1e4", None)


def test_nested_keys_on_the_command_line(tmp_path: Path) -> None:
    text = "eval_gen: {max_length: 6}\ntask: {type: classification, labels: {0: no, 1: yes}}\n"
    cfg, provenance = load(
        tmp_path,
        f"{text}min_eval_metric_after_epoch: {{1: 0.5}}\n",
        command_line={
            "eval_gen.num_beams": "4",
            "task.labels.0": "wrong",
            "min_eval_metric_after_epoch.1": "0.25",
            "min_eval_metric_after_epoch.3": "0.75",
            "peft.peft_type": "LORA",
            "peft.r": "2",
        },
    )
    assert cfg.eval_gen == {"max_length": 6, "num_beams": 4}
    assert cfg.task == {"type": "classification", "labels": {0: "wrong", 1: "yes"}}
    assert cfg.min_eval_metric_after_epoch == {1: 0.25, 3: 0.75}
    assert cfg.peft == {"peft_type": "LORA", "r": 2}
    lines = describe_overrides(cfg, provenance)
    assert "min_eval_metric_after_epoch.1 = 0.25  (command line)" in lines
    assert "task.labels.0 = wrong  (command line)" in lines


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ({"seed.x": "4"}, "command line: seed is {'x': 4}; expected a whole number"),
        ({"eval_gem.num_beams": "4"}, "command line: unknown key 'eval_gem'; did you mean"),
        ({"eval_gen.num_beams": "x"}, "run.yaml:3, command line: eval_gen: num_beams: 'x'"),
        ({"peft.r": "4"}, "command line: peft.r cannot be set, as peft is 'a.json'; give peft as"),
        ({"tokenizer": "x", "tokenizer.type": "word"}, "tokenizer.type cannot be set, as token"),
    ],
)
def test_a_nested_key_that_is_wrong_has_its_own_place(
    tmp_path: Path, command_line: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, "eval_gen: {max_length: 6}\npeft: a.json\n", command_line=command_line)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("one, other", [("resume", "overwrite"), ("overwrite", "resume")])
def test_a_flag_wins_over_the_files_opposite(tmp_path: Path, one: str, other: str) -> None:
    cfg, provenance = load(tmp_path, f"{other}: true\n", command_line={one: "true"})
    assert (getattr(cfg, one), getattr(cfg, other)) == (True, False)
    assert provenance[other] == "command line"
    cfg, _ = load(tmp_path, f"{other}: true\n", command_line={one: "false"})
    assert getattr(cfg, other)
    with pytest.raises(InputError, match="resume and overwrite are both set"):
        load(tmp_path, command_line={one: "true", other: "true"})


def test_the_old_default_may_be_written_out(tmp_path: Path) -> None:
    cfg, _ = load(tmp_path, "min_eval_metric_after_epoch: null\nlogits_to_keep: null\n")
    assert (cfg.min_eval_metric_after_epoch, cfg.logits_to_keep) == ({}, None)


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    cfg, _ = load(
        tmp_path,
        "learning_rate: 1e-5\nval_data: '1e5'\ntask: {prompt: 'no: {x}', a: 'null', b: '010'}\n"
        "min_eval_metric_after_epoch: {2: 0.5}\npeft: {peft_type: LORA, r: 4}\n",
        environment={"HP_PEFT_R": "8"},
    )
    again, _ = load_config(write(tmp_path, dump_yaml(cfg), "cfg.yaml"))
    assert again == cfg
    assert again.peft_overrides.r == 8
    assert run_directory(again, "cfg.yaml") == run_directory(cfg, "run.yaml")


def test_resolved_config_does_not_overwrite_when_run_again(tmp_path: Path) -> None:
    cfg, _ = load(tmp_path, "overwrite: true\n")
    again, _ = load_config(write(tmp_path, dump_yaml(cfg), "cfg.yaml"))
    assert cfg.overwrite and not again.overwrite


def test_json_run_config(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{\n\t"data": "quickstart",\n\t"new_model": {"model_type": "mamba"},\n'
        '\t"min_eval_metric_after_epoch": {"3": 0.5},\n\t"prec": "fp32"\n}\n',
        "run.json",
    )
    cfg, provenance = load_config(path)
    assert cfg.min_eval_metric_after_epoch == {3: 0.5}
    assert provenance["prec"] == f"{path}:5"


def test_peft_json_is_the_peft_of_the_default_mamba_run(tmp_path: Path) -> None:
    path = write(tmp_path, '{"peft_type": "LORA", "r": 8}', "lora_qkvo_r8_a16.json")
    cfg, _ = load_config(path, {"data": "quickstart"}, {"HP_PEFT_R": "4"})
    assert cfg.model is not None and "mamba" in cfg.model
    assert cfg.peft == str(path)
    assert cfg.peft_overrides.r == 4
    assert run_directory(cfg, path).name == "lora_qkvo_r8_a16"


@pytest.mark.parametrize(
    ("targets", "family"),
    [
        (["attn.q_proj", "attn.k_proj"], "gla"),
        (["gk_proj.1"], "gla"),
        (["layers.3.mlp.gate_proj"], "gla"),
        (["in_proj", "x_proj"], "mamba"),
        (["dt_proj", "out_proj"], "mamba"),
        ("all-linear", "mamba"),
        (None, "mamba"),
    ],
)
def test_the_default_run_follows_the_targets(tmp_path: Path, targets: Any, family: str) -> None:
    peft = {"peft_type": "LORA", "r": 8, "target_modules": targets}
    cfg, provenance = load_config(write(tmp_path, json.dumps(peft), "lora.json"))
    assert cfg.model is not None and family in cfg.model and cfg.data == "glue-tvt_cola"
    assert "default" in provenance["model"] and family in provenance["model"].lower()


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "0", "3"])
def test_devices(tmp_path: Path, device: str) -> None:
    assert load(tmp_path, command_line={"device": device})[0].device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "-1", "0,1", "cpu:0"])
def test_what_is_no_device(tmp_path: Path, device: str) -> None:
    with pytest.raises(InputError, match="device is .*expected auto"):
        load(tmp_path, command_line={"device": device})


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("glue-tvt_cola", "glue-tvt_cola_seed42"),
        ("some/where/train.jsonl", "train_seed42"),
        ("org/set", "set_seed42"),
        ("a b?.csv", "a_b__seed42"),
    ],
)
def test_run_directory_is_named_after_the_data(tmp_path: Path, data: str, name: str) -> None:
    cfg, _ = load(tmp_path, command_line={"data": data, "output_root": str(tmp_path)})
    assert run_directory(cfg, "run.yaml") == tmp_path / name / "run"


@pytest.mark.parametrize(("variable", "key"), DIRECTORIES.items())
def test_directories_of_this_machine_are_defaults(tmp_path: Path, variable: str, key: str) -> None:
    variables = {variable: "elsewhere"}
    cfg, provenance = load(tmp_path, environment=variables)
    assert (getattr(cfg, key), provenance[key]) == ("elsewhere", variable)
    cfg, _ = load(tmp_path, f"{key}: here\n", environment=variables)
    assert getattr(cfg, key) == "here"


def test_a_link_does_not_lead_out_of_the_output_root(tmp_path: Path) -> None:
    (tmp_path / "root" / "quickstart_seed42").mkdir(parents=True)
    (tmp_path / "root" / "quickstart_seed42" / "run").symlink_to(tmp_path)
    cfg, _ = load(tmp_path, f"output_root: {tmp_path}/root\n")
    with pytest.raises(InputError, match="outside output_root"):
        run_directory(cfg, "run.yaml")


def test_all_problems_are_listed_with_their_lines(tmp_path: Path) -> None:
    text = "learning_rat: 1\nbatch_size: four\nprec: fp8\n"
    with pytest.raises(InputError) as caught:
        load(tmp_path, text, environment={"HP_SEED": "x"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    source = tmp_path / "run.yaml"
    assert f"{source}:3: unknown key 'learning_rat'; did you mean 'learning_rate'" in str(lines)
    assert f"{source}:4: batch_size is 'four'; expected a whole number, at least 1" in lines
    assert f"{source}:5: prec is 'fp8'; expected 'bf16' or 'fp16' or 'fp32'" in lines
    assert "HP_SEED: seed is 'x'; expected a whole number, at least 0" in lines


@pytest.mark.parametrize(
    "layers",
    [{"command_line": {"tokens_per_batch": "{}"}}, {"environment": {"HP_TOKENS_PER_BATCH": "{}"}}],
    ids=["command line", "variable"],
)
def test_tokens_per_batch_is_a_number_or_auto(
    tmp_path: Path, layers: dict[str, dict[str, str]]
) -> None:
    def given(text: str) -> dict[str, Any]:
        return {k: {key: v.format(text) for key, v in layer.items()} for k, layer in layers.items()}

    assert load(tmp_path, "packing: true\n", **given("4096"))[0].tokens_per_batch == 4096
    assert load(tmp_path, "packing: true\n", **given("auto"))[0].tokens_per_batch == "auto"
    for wrong in ("all", "15", "1.5"):
        with pytest.raises(InputError, match="; expected a whole number, at least 16, or 'auto'$"):
            load(tmp_path, "packing: true\n", **given(wrong))
    with pytest.raises(InputError, match="tokens_per_batch has no effect without `packing: true`"):
        load(tmp_path, **given("auto"))


def test_auto_has_room_for_any_max_length(tmp_path: Path) -> None:
    text = "packing: true\nmax_length: 20000\n"
    assert load(tmp_path, text + "tokens_per_batch: auto\n")[0].max_length == 20_000
    with pytest.raises(
        InputError, match="max_length 20000 does not fit into tokens_per_batch 16384"
    ):
        load(tmp_path, text)


def test_every_key_is_described_and_every_type_has_words() -> None:
    for schema in (RunConfig, PeftOverrides):
        for key, field in schema.model_fields.items():
            assert field.description, key
            assert expected(field), key
