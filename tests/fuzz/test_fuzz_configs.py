"""Run configs: whatever a file holds, it is a run or an InputError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st
from made_inputs import (
    as_json,
    attempt,
    damaged,
    examples,
    misspelt,
    plausible,
    temporary_directory,
    values,
)

from ssm_train.assemble import choose_main_metric, find_splits
from ssm_train.config import RunConfig, describe_overrides, dump_yaml, load_config, run_directory
from ssm_train.data.sources import check_data
from ssm_train.peft.spec import load_peft

DIRECTORY = temporary_directory()
DATA = DIRECTORY / "train.jsonl"
DATA.write_text('{"question": "a", "answer": "b"}\n' * 4)
WORKS: dict[str, Any] = {
    "data": str(DATA),
    "val_data": str(DATA),
    "task": {"type": "generation", "prompt": "{question} =>", "label": "{answer}"},
    "new_model": {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1},
    "tokenizer": {"type": "word"},
    "output_root": str(DIRECTORY / "output"),
}
TASK_KEYS = ["type", "prompt", "label", "label_field", "labels", "metrics", "references", "field",
             "template", "variables", "reserved"]  # fmt: skip
TASK_VALUES = st.one_of(
    values,
    st.sampled_from(["classification", "generation", "chat", "text", "spider", "plain", "{answer}",
                     "answer", "{{ messages }}", "{% raw", {"1": "a", "0": "b"}, ["{question}"],
                     {1: "a", False: "b"}, ["bleu"], ["accuracy", "x"], {"messages": 1}]),
)  # fmt: skip
tasks = st.dictionaries(misspelt(TASK_KEYS), TASK_VALUES, max_size=4).map(
    lambda changes: {"task": {**WORKS["task"], **changes}}
)
generation = st.dictionaries(
    misspelt(["max_length", "min_length", "num_beams", "do_sample", "temperature"]),
    values,
    max_size=3,
).map(lambda options: {"eval_gen": options})
configs = st.one_of(plausible(), plausible(), tasks, generation).map(lambda c: {**WORKS, **c})


def use(content: bytes, name: str) -> None:
    """All that is made of a config before a model is built."""
    path = DIRECTORY / name
    path.write_bytes(content)
    loaded = attempt(lambda: load_config(path))
    if loaded is None:
        return
    cfg, provenance = loaded
    again = DIRECTORY / "again.yaml"
    again.write_text(dump_yaml(cfg), encoding="utf-8")
    launch = {"resume": cfg.resume, "overwrite": cfg.overwrite}
    assert load_config(again)[0].model_copy(update=launch) == cfg
    describe_overrides(cfg, provenance)
    directory = attempt(lambda: run_directory(cfg, path))
    if directory is not None:
        root = Path(cfg.output_root).resolve()
        assert directory.resolve().parent.parent == root
    attempt(lambda: prepare(cfg))
    assert not (DIRECTORY / "output").exists()


def prepare(cfg: RunConfig) -> None:
    load_peft(cfg.peft, cfg.peft_overrides.given())
    task = check_data(cfg, find_splits(cfg))
    choose_main_metric(cfg, task)


@examples(300)
@given(configs)
def test_yaml_config(values: dict[str, Any]) -> None:
    use(yaml.safe_dump(values, sort_keys=False).encode(), "run.yaml")


@examples(200)
@given(damaged(configs.map(as_json)))
def test_json_config(content: bytes) -> None:
    use(content, "run.json")


YAML_PIECES = [
    *(
        "a",
        "data",
        ": ",
        ":",
        "\n",
        "  ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "&x ",
        "*x",
        "'",
        '"',
        "#",
    ),
    *(
        "!!python/object/apply:os.system ",
        "!!binary ",
        "!!timestamp ",
        "!!set ",
        "!t ",
        "|\n",
        ">-\n",
    ),
    *("%YAML 1.1\n", "---\n", "...\n", "<<", "? ", "~", "1e3", ".nan", "0x1f", "1_0", "9" * 5_000),
    *("\t", "\\x", "\x85", "\ufeff", "@", "`"),
]


@examples(300)
@given(damaged(st.lists(st.sampled_from(YAML_PIECES), max_size=25).map("".join)))
def test_yaml_text(content: bytes) -> None:
    use(content, "run.yaml")


@examples(200)
@given(damaged(configs.map(lambda c: yaml.safe_dump(c, sort_keys=False))))
def test_damaged_yaml_config(content: bytes) -> None:
    use(content, "run.yaml")
