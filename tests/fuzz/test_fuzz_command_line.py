"""Words of the command line and variables of the environment: a run's config or an InputError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from made_inputs import as_json, attempt, examples, misspelt, numbers, texts, values
from test_fuzz_configs import DIRECTORY, WORKS, prepare

from ssm_train.cli import build_parser, main
from ssm_train.commands import BAD_INPUT, overrides_of
from ssm_train.config import (
    RunConfig,
    describe_overrides,
    dump_yaml,
    load_config,
    read_peft_overrides,
)
from ssm_train.launch.plan import plan_suite
from ssm_train.overrides import DIRECTORIES, ENVIRONMENT, NO_LONGER_READ, unread_variables
from ssm_train.peft.spec import load_peft

CONFIG = DIRECTORY / "works.yaml"
CONFIG.write_text(yaml.safe_dump(WORKS))
KEYS = [*RunConfig.model_fields, "task.prompt", "task.labels.x", "new_model.hidden_size", "a.b.c",
        "peft_overrides.r", "peft.r", "eval_gen.num_beams", "min_eval_metric_after_epoch.3",
        "data.x", "task.metrics.0", "peft_overrides.r.x", "..", "task."]  # fmt: skip
setting_texts = st.one_of(
    texts, values.map(as_json), numbers.map(str), st.sampled_from(["yes", "off", "1e-3", "{a: 1}"])
).map(lambda text: text.replace("\0", ""))
overrides = st.dictionaries(misspelt(KEYS), setting_texts, max_size=3)
variables = st.dictionaries(
    misspelt([*ENVIRONMENT, *DIRECTORIES, *NO_LONGER_READ, "HP_LEARNING_RATE"]),
    setting_texts,
    max_size=3,
)
words = st.lists(
    st.one_of(
        st.builds("{}={}".format, misspelt(KEYS), setting_texts),
        st.sampled_from(["--resume", "--overwrite", "--lock", "--debug", "--model", "--device=cpu",
                         "--cfg", "--", "-x", "--help=1", str(CONFIG), "=", "a="]),
        texts,
    ),
    max_size=4,
)  # fmt: skip


@examples(300)
@given(overrides, variables)
def test_layers(words: dict[str, str], environment: dict[str, str]) -> None:
    loaded = attempt(lambda: load_config(CONFIG, words, environment))
    list(unread_variables(environment))
    attempt(lambda: read_peft_overrides(environment))
    if loaded is None:
        return
    cfg, provenance = loaded
    describe_overrides(cfg, provenance)
    again = DIRECTORY / "again.yaml"
    again.write_text(dump_yaml(cfg), encoding="utf-8")
    launch = {"resume": cfg.resume, "overwrite": cfg.overwrite}
    assert load_config(again)[0].model_copy(update=launch) == cfg
    attempt(lambda: load_peft(cfg.peft, cfg.peft_overrides.given(), provenance))
    attempt(lambda: prepare(cfg))


@examples(200)
@given(words)
def test_words(words: list[str]) -> None:
    def read() -> Any:
        arguments, rest = build_parser().parse_known_args(["train", "--cfg", str(CONFIG), *words])
        arguments.rest = [word for word in rest if "=" in word and not word.startswith("-")]
        return load_config(arguments.cfg, overrides_of(arguments))

    attempt(read)


COMMANDS = ["eval", "generate", "merge", "plot", "report", "plan", "slurm", "warmup", "x"]
OPTIONS = ["--cfg", "--out", "--split", "--data", "--checkpoint", "--device", "--json", "--prompt",
           "--file", "--tolerance", "--gpus", "--gib", "--time", "--nodes", "--sbatch"]  # fmt: skip


@examples(100)
@given(
    st.sampled_from(COMMANDS),
    st.lists(st.one_of(st.sampled_from(OPTIONS), setting_texts), max_size=5),
)
def test_other_commands_refuse(command: str, words: list[str]) -> None:
    """What names no run and no config ends with exit code 2."""
    known = {".", "..", "/", "~"}  # these exist
    if known & set(words) or command == "warmup" or "-h" in words:
        return
    before = set(Path.cwd().iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", None)
        assert main([command, *words]) == BAD_INPUT
    assert set(Path.cwd().iterdir()) == before


suites = st.dictionaries(
    st.sampled_from(["GPU_IDS", "GPU_PLAN", "CFG_DIR", "PEFT_DIR", "EXP_ROOT", "DATA", "FORCE_SEED",
                     "HP_DATA", "STOP_GRACE", "PYTHON", "CUDA_VISIBLE_DEVICES", "LOG_DIR"]),
    st.one_of(setting_texts, st.sampled_from(["0,1", "0:2,1:3", "0", "1:0", ","])),
    max_size=4,
)  # fmt: skip


@examples(100)
@given(
    st.lists(st.one_of(st.sampled_from(["E1", "E2", "1", "all", "2-3"]), texts), max_size=3), suites
)
def test_suites(words: list[str], environment: dict[str, str]) -> None:
    attempt(lambda: plan_suite(words, environment))
