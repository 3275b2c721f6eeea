"""Bad input ends in one clear line that names the field, the value and the way out; no traceback,
no half-written run. One table: a case is a change to a run that works."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT, DONE

ROOT = Path(__file__).parents[2]
RECORDS = [{"question": f"a {n} b", "answer": f"{n} c"} for n in ["one", "two", "three", "four"]]
WORKS: dict[str, Any] = {
    "data": "train.jsonl",
    "val_data": "train.jsonl",
    "task": {"type": "generation", "prompt": "{question} =>", "label": "{answer}"},
    "new_model": {
        "model_type": "mamba",
        "hidden_size": 8,
        "state_size": 2,
        "num_hidden_layers": 1,
    },
    "tokenizer": {"type": "word"},
    "prec": "fp32",
    "batch_size": 2,
    "max_steps": 1,
    "device": "cpu",
    "output_root": "output",
}
REMOVED = object()
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["in_proj"]}
CLASSES = {"type": "classification", "prompt": "{question}", "label_field": "answer"}


@dataclass(frozen=True)
class Case:
    """What is wrong, and what the message must say."""

    id: str
    expected: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of WORKS that differ; REMOVED takes a key away."""
    text: str | bytes | None = None
    """The whole config file instead."""
    files: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    command: tuple[str, ...] | None = None
    """Another command line than `train --cfg run.yaml <arguments>`."""
    variables: Mapping[str, str] = field(default_factory=dict)

    def write(self, directory: Path) -> list[str]:
        """Writes the case's files below `directory`; returns its command line."""
        data = "".join(json.dumps(record) + "\n" for record in RECORDS)
        for name, content in {"train.jsonl": data, **self.files}.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        if self.text is None:
            values = {k: v for k, v in {**WORKS, **self.changes}.items() if v is not REMOVED}
            config: str | bytes = yaml.safe_dump(values, sort_keys=False)
        else:
            config = self.text
        content_bytes = config if isinstance(config, bytes) else config.encode()
        (directory / "run.yaml").write_bytes(content_bytes)
        return list(self.command or ("train", "--cfg", "run.yaml", *self.arguments))


def changed(name: str, changes: Mapping[str, Any], *expected: str, **more: Any) -> Case:
    return Case(name, expected, changes, **more)


FILES = [
    Case("no config file", ("nope.yaml does not exist",), command=("train", "--cfg", "nope.yaml")),
    Case("config is a directory", (". is a directory",), command=("train", "--cfg", ".")),
    Case("not text", ("run.yaml", "not UTF-8"), text=b"data: \xff\xfe"),
    Case("empty config", ("run.yaml: data is missing", "JSONL"), text=""),
    Case("malformed YAML", ("run.yaml:2", "not valid YAML"), text="data: x\nseed: ]\n"),
    Case("open bracket", ("run.yaml", "not valid YAML", "line 2"), text="data: x\nseed: [1, 2\n"),
    Case("tab in YAML", ("run.yaml:2", "not valid YAML"), text="data: x\n\tseed: 1\n"),
    Case(
        "repeated key", ("run.yaml:3", "'seed'", "twice", "line 1"), text="seed: 1\na: 2\nseed: 3"
    ),
    Case(
        "repeated nested key",
        ("run.yaml:3", "'num_beams'", "twice"),
        text="eval_gen:\n  num_beams: 1\n  num_beams: 2\n",
    ),
    Case(
        "aliases",
        ("run.yaml:1", "anchors and aliases", "write the value out"),
        text="task: &a {x: 1}\neval_gen: *a\n",
    ),
    Case("too large", ("run.yaml: 1200000 bytes", "at most 1000000"), text="#" * 1_200_000),
    Case("too deep", ("run.yaml:1", "more than 20 levels"), text="task: " + "[" * 500 + "]" * 500),
    Case("a list", ("run.yaml", "list", "key: value"), text="- data\n- seed\n"),
    Case("a mapping as key", ("run.yaml:1", "not valid YAML"), text="{a: 1}: 2\n"),
    Case(
        "malformed JSON",
        ("run.json:3", "not valid JSON"),
        files={"run.json": '{\n"data": "x",\n"seed" 1\n}'},
        command=("train", "--cfg", "run.json"),
    ),
    Case(
        "repeated JSON key",
        ("run.json:3", "'seed'", "twice"),
        files={"run.json": '{\n"seed": 1,\n"seed": 2\n}'},
        command=("train", "--cfg", "run.json"),
    ),
]

KEYS = [
    changed("unknown key", {"learning_rat": 1}, "'learning_rat'", "did you mean 'learning_rate'"),
    changed("metric not measured", {"metric_for_best": "acuracy"}, "metric_for_best", "acuracy"),
    changed(
        "least loss",
        {"min_eval_metric_after_epoch": {1: 2.0}, "metric_for_best": "loss"},
        "min_eval_metric_after_epoch",
        "less is better",
    ),  # fmt: skip
    changed("key of other trainers", {"lr": 1e-3}, "unknown key 'lr'", "here it is learning_rate"),
    changed("metric of answers", {"metric_for_best": "bleu"}, "'bleu'", "set eval_gen"),
    changed("unknown key like none", {"xyzzy": 1}, "unknown key 'xyzzy'", "learning_rate"),
    changed("text for a number", {"learning_rate": "fast"}, "learning_rate is 'fast'", "a number"),
    changed("fraction for a count", {"batch_size": 4.5}, "batch_size is 4.5", "a whole number"),
    changed("text for a switch", {"debug": "yes"}, "debug is 'yes'", "true or false"),
    changed("negative", {"learning_rate": -1.0}, "learning_rate is -1.0", "at least 0"),
    changed("zero", {"batch_size": 0}, "batch_size is 0", "at least 1"),
    changed("not finite", {"weight_decay": float("inf")}, "weight_decay is inf", "a number"),
    changed("precision", {"prec": "fp8"}, "prec is 'fp8'", "'bf16' or 'fp16' or 'fp32'"),
    changed("device", {"device": "tpu"}, "device is 'tpu'", "cpu", "cuda:1"),
    changed("optimizer", {"optim": "sgd"}, "optim is 'sgd'", "'adamw_torch'"),
    changed("text for a list", {"trackers": "wandb"}, "trackers is 'wandb'", "a list"),
    changed("tracker", {"trackers": ["wandbb"]}, "'wandbb'", "did you mean 'wandb'"),
    changed(
        "epoch that is none",
        {"min_eval_metric_after_epoch": {"three": 0.5}},
        *("min_eval_metric_after_epoch is 'three'", "epoch -> number"),
    ),
    changed("decoder key", {"eval_gen": {"num_beam": 2}}, "'num_beam'", "did you mean 'num_beams'"),
    changed("decoder value", {"eval_gen": {"num_beams": 0}}, "eval_gen", "num_beams", "0"),
]

TOGETHER = [
    changed("no model", {"new_model": REMOVED}, "neither model nor new_model", "give one"),
    changed("two models", {"model": "x/y"}, "model and new_model are both given", "keep one"),
    changed("model without type", {"new_model": {"hidden_size": 8}}, "model_type", "mamba"),
    changed("tokenizer type", {"tokenizer": {"vocab_size": 9}}, "tokenizer", "type: word"),
    changed("peft without type", {"peft": {"r": 8}}, "peft", "peft_type: LORA"),
    changed(
        "missing base config",
        {"model": "base.yaml", "new_model": REMOVED},
        *("model is 'base.yaml'", "does not exist"),
    ),
    changed("resume and overwrite", {"resume": True, "overwrite": True}, "resume", "choose one"),
    changed("name that climbs", {"name": "../other"}, "'../other'", "letters, digits", "name="),
    changed(
        "packing counts tokens",
        {"packing": True, "batch_size": 8},
        *("batch_size 8 has no effect with packing", "tokens_per_batch"),
    ),
    changed("dead key", {"tokens_per_batch": 64}, "tokens_per_batch", "`packing: true`"),
    changed(
        "constant with warm-up",
        {"lr_scheduler_type": "constant", "warmup_steps": 1},
        *("'constant' has no warm-up", "constant_with_warmup"),
    ),
    changed("warm-up too long", {"warmup_steps": 9}, "warmup_steps 9", "max_steps 1"),
    changed(
        "metric without evaluation",
        {"skip_eval": True, "metric_for_best": "bleu"},
        *("metric_for_best has no effect with skip_eval", "remove one"),
    ),
]

COMMAND_LINE = [
    Case("not key=value", ("'seed'", "key=value"), arguments=("seed",)),
    Case("given twice", ("prec", "twice"), arguments=("--prec", "fp32", "prec=bf16")),
    Case("unknown key=value", ("command line", "'sede'", "'seed'"), arguments=("sede=1",)),
    Case("unknown flag", ("'--overwite'", "--help"), arguments=("--overwite",)),
    Case("key as a flag", ("'--learning_rate'", "without dashes: learning_rate=..."),
         arguments=("--learning_rate", "1e-3")),
    Case("key as a flag of dashes", ("'--batch-size=4'", "dashes: batch_size=4"),
         arguments=("--batch-size=4",)),
    Case("bad override", ("command line: seed is 'x'", "whole number"), arguments=("seed=x",)),
    Case("no config named", ("--cfg", "--help"), command=("train",)),
    Case("unknown command", ("'trian'", "train"), command=("trian",)),
    Case("variable", ("HP_LR: learning_rate is 'fast'", "a number"), variables={"HP_LR": "fast"}),
    Case("misspelt variable", ("HP_EPOCH", "HP_EPOCHS"), variables={"HP_EPOCH": "1"}),
    Case("variable for nothing", ("HP_PEFT_R", "without peft"), variables={"HP_PEFT_R": "8"}),
    Case("no launcher", ("WORLD_SIZE is 2", "torchrun"), variables={"WORLD_SIZE": "2"}),
    Case("plot of nothing", ("RUN_DIR nope", "does not exist"), command=("plot", "nope")),
    Case("eval of a config", ("RUN_DIR run.yaml is a file",), command=("eval", "run.yaml")),
    Case("eval of nothing", ("RUN_DIR .", "cfg.yaml"), command=("eval", ".")),
    Case("no prompts", ("--prompt", "--file"), command=("generate", ".")),
    Case("merge onto files", ("--out . ", "not an empty"), command=("merge", ".", "--out", "."),
         files={"cfg.yaml": ""}),
]  # fmt: skip

GOOD = '{"question": "q", "answer": "x"}\n'
DATA = [
    changed("no data file", {"data": "nope.jsonl"}, "nope.jsonl", "data"),
    changed("no data set", {"data": "quikstart"}, "data: quikstart", "'quickstart'"),
    changed("split of a file", {"val_data_split": "tset"}, "'tset'", "known: train, val, test"),
    changed("no task", {"task": REMOVED}, "task is missing", "docs/data.md"),
    changed("unknown task", {"task": "sst3"}, "'sst3'", "'sst2'"),
    changed("no validation data", {"val_data": REMOVED}, "train.jsonl", "'val'", "set val_data"),
    changed("empty data", {}, "train.jsonl", "no records", files={"train.jsonl": ""}),
    changed(
        "malformed record",
        *({}, "train.jsonl:2", "malformed JSON"),
        files={"train.jsonl": GOOD + '{"question": \n'},
    ),
    changed(
        "record that is a list",
        *({}, "train.jsonl:2", "a list"),
        files={"train.jsonl": GOOD + "[1]\n"},
    ),
    changed(
        "list of records as lines",
        *({}, "train.jsonl:1", "a list of records is .json"),
        files={"train.jsonl": "[" + GOOD.strip() + "]"},
    ),
    changed(
        "records over several lines",
        *({}, "train.jsonl:1", "malformed JSON", "one record a line"),
        files={"train.jsonl": json.dumps([{"question": "q", "answer": "x"}], indent=1)},
    ),
    changed(
        "record without the field",
        *({}, "train.jsonl:2", "'answer'"),
        files={"train.jsonl": GOOD + '{"question": "q"}\n'},
    ),
    changed(
        "label outside the set",
        {"task": {**CLASSES, "labels": {"one c": "yes", "two c": "no"}}},
        *("train.jsonl:3", "'three c'", "'answer'", "known"),
    ),
    changed("all too long", {"max_length": 2}, "max_length", "2"),
    changed("tokenizer key", {"tokenizer": {"type": "word", "size": 9}}, "tokenizer", "'size'"),
]

MODELS = [
    changed("model of no family", {"new_model": {"model_type": "gpt9"}}, "gpt9", "mamba"),
    changed("a hybrid", {"new_model": {"model_type": "jamba"}}, "jamba", "mamba"),
    changed(
        "model that is nowhere",
        {"model": "no/such-mamba", "new_model": REMOVED},
        *("no/such-mamba", "model"),
    ),
    changed(
        "model that is nowhere, without a tokenizer",
        {"model": "no/such-mamba", "new_model": REMOVED, "tokenizer": REMOVED},
        *("model: 'no/such-mamba' is not a directory", "check the name"),
    ),
    changed(
        "directory without a model",
        {"model": "./empty", "new_model": REMOVED},
        *("empty", "config.json"),
        files={"empty/x": ""},
    ),
    changed("no such tokenizer", {"tokenizer": "no/such-words"}, "tokenizer", "no/such-words"),
    changed("no GPU for Triton", {"kernels": "triton"}, "kernels", "triton", "auto"),
]

PEFT = [
    changed("no PEFT", {"peft": "None"}, "None does not exist", "full fine-tuning write null"),
    changed("no PEFT file", {"peft": "nope.json"}, "nope.json", "does not exist"),
    changed(
        "malformed PEFT file",
        {"peft": "lora.json"},
        *("lora.json:2", "not valid JSON"),
        files={"lora.json": '{"peft_type": "LORA",\n}'},
    ),
    changed("PEFT method", {"peft": {**LORA, "peft_type": "LORRA"}}, "'LORRA'", "LORA"),
    changed("PEFT key", {"peft": {**LORA, "lora_alhpa": 1}}, "'lora_alhpa'", "'lora_alpha'"),
    changed("rank zero", {"peft": {**LORA, "r": 0}}, "peft: r is 0", "1"),
    changed(
        "targets that match nothing",
        {"peft": {**LORA, "target_modules": ["in_proj", "inn_proj"]}},
        *("'inn_proj'", "in_proj"),
    ),
    changed("rank larger than the matrix", {"peft": {**LORA, "r": 64}}, "64", "8", "in_proj"),
    changed("convolution", {"peft": {**LORA, "target_modules": ["conv1d"]}}, "conv1d", "full"),
]

DIRECTORIES = [
    changed(
        "files in the way",
        *({}, "output/train_seed42/run", "move them or set output_root"),
        files={"output/train_seed42/run/precious.txt": ""},
    ),
    changed("output below a file", {"output_root": "train.jsonl"}, "train.jsonl", "output_root"),
    changed("tracker that is missing", {"trackers": ["swanlab"]}, "swanlab", "pip install swanlab"),
]

CASES = [*FILES, *KEYS, *TOGETHER, *COMMAND_LINE, *DATA, *MODELS, *PEFT, *DIRECTORIES]
IN_A_PROCESS = ("no config file", "repeated key", "unknown key", "variable", "two models")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, without the variables of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    for variable in list(os.environ):
        if variable.startswith(("HP_", "LR_", "SSM_TRAIN_")):
            monkeypatch.delenv(variable)
    return tmp_path


def check(case: Case, code: int, message: str, directory: Path) -> None:
    assert code == BAD_INPUT, message
    assert "Traceback" not in message
    lines = message.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), message
    assert len(lines) == 1, f"one problem, {len(lines)} lines: {message}"
    for part in case.expected:
        assert part in message, f"{part!r} is not in {message!r}"
    assert not list(directory.glob("output/**/cfg.yaml")), "a half-written run"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id.replace(" ", "-"))
def test_bad_input_is_one_clear_line(
    case: Case,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if case.id == "tracker that is missing":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for variable, value in case.variables.items():
        monkeypatch.setenv(variable, value)
    arguments = case.write(directory)
    code = main(arguments)
    check(case, code, capsys.readouterr().err, directory)


def test_a_rank_of_no_launch(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(Case("rank", ()).write(directory)) == BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error (rank 1): RANK is 1, but WORLD_SIZE is ")
    assert not list(directory.glob("output/**/cfg.yaml"))


def test_the_run_that_the_cases_change_works(directory: Path) -> None:
    assert main(Case("works", ()).write(directory)) == DONE
    assert (directory / "output/train_seed42/run/cfg.yaml").is_file()


def test_a_used_run_directory_is_left_alone(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = directory / "output/train_seed42/run/cfg.yaml"
    arguments = Case("used", (), files={str(marker.relative_to(directory)): "kept"}).write(
        directory
    )
    assert main(arguments) == BAD_INPUT
    message = capsys.readouterr().err
    assert "output/train_seed42/run" in message and "--resume" in message
    assert marker.read_text() == "kept"


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_the_command_line_says_the_same(name: str, directory: Path) -> None:
    case = next(case for case in CASES if case.id == name)
    result = subprocess.run(
        [sys.executable, "-m", "ssm_train", *case.write(directory)],
        capture_output=True,
        text=True,
        env={**os.environ, **case.variables},
    )
    check(case, result.returncode, result.stderr, directory)
    assert result.stdout == ""


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40 and len({case.id for case in CASES}) == len(CASES)


def test_a_python_without_our_packages_is_one_line(directory: Path) -> None:
    """`python train.py` outside the environment; -S leaves out what is installed."""
    command = [sys.executable, "-S", str(ROOT / "train.py"), "--cfg", "run.yaml"]
    result = subprocess.run(command, capture_output=True, text=True)
    check(
        Case("bare", ("has no ", "pip install -e .")), result.returncode, result.stderr, directory
    )


def test_an_old_python_is_one_line(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    code = main(["doctor"])
    case = Case("old", ("is Python 3.9.18, not 3.11 to 3.13", "activate the environment"))
    check(case, code, capsys.readouterr().err, directory)


@pytest.mark.parametrize("name", ["__init__", "cli", "commands", "errors", "secrets"])
def test_an_old_python_can_read_what_tells_it(name: str) -> None:
    """`X | None` in a signature would stop it, as would newer syntax."""
    source = (ROOT / "ssm_train" / f"{name}.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 9))
    assert "from __future__ import annotations" in source
