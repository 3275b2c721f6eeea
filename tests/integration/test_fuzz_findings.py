"""What `make fuzz` found: every input on which the code broke, once more as a plain test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import write_config

from ssm_train import checkpoint, snapshot
from ssm_train.adapters.base import ModelSpec
from ssm_train.adapters.loading import save_model
from ssm_train.adapters.registry import resolve
from ssm_train.checkpoint import MANIFEST, own_digest
from ssm_train.cli import main
from ssm_train.commands import BAD_INPUT
from ssm_train.data.records import read_records
from ssm_train.data.tasks import build_task
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.durable import digest
from ssm_train.errors import InputError
from ssm_train.finished import find_checkpoint
from ssm_train.launch.plan import parse_seed
from ssm_train.launch.slots import parse_plan
from ssm_train.metrics import read_metrics
from ssm_train.peft.export import export_adapter, load_adapter
from ssm_train.peft.spec import load_peft
from ssm_train.resume import find_resume_point
from ssm_train.strict_yaml import dump, parse_yaml
from ssm_train.terminal import printable

# ---------------------------------------------------------------- configs and command lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: \x00", "not valid YAML"),
        ("data: !!timestamp x", "tags"),
        ("seed: !!int x", "tags"),
        ("seed: " + "9" * 5_000, "digits"),
        ("null: 1\ndata: x", "unknown key 'None'"),
        ("1: 1\ndata: x", "unknown key '1'"),
        ("data: x\npeft_overrides: {null: 1}", "unknown key 'peft_overrides.None'"),
        ("data: x\npeft_overrides: {init_lora_weights: []}", "init_lora_weights is []"),
        ("data: x\nmodel: y\nmin_eval_metric_after_epoch: {'²': 1.0}", "min_eval_metric"),
        ("data: random_" + "9" * 5_000 + "\nmodel: y\ntask: dart", "give another path"),
        ("data: x\nmodel: y\ntask: {type: []}", "task.type is []"),
        ("data: x\nmodel: y\ntask: {type: {a: 1}}", "task.type is {'a': 1}"),
    ],
)
def test_config(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text + f"\noutput_root: {tmp_path}/output\n", encoding="utf-8")
    assert main(["train", "--cfg", str(path)]) == BAD_INPUT
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("command", ["eval", "plot", "merge", "generate"])
def test_a_name_that_the_file_system_refuses(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"merge": ["--out", "x"], "generate": ["--prompt", "x"]}.get(command, [])
    assert main([command, "x" * 5_000, *more]) == BAD_INPUT
    said = capsys.readouterr().err
    assert "File name too long; give another path" in said and len(said) < 2_200


def test_a_message_neither_fills_nor_steers_the_terminal() -> None:
    assert printable("a\x1b[2Jb\u202ec\r") == "a\\x1b[2Jb\\u202ec\\r"
    assert printable("größer 中文 \U0001f600") == "größer 中文 \U0001f600"
    assert len(printable("x" * 1_000_000)) < 2_100


@pytest.mark.parametrize("number", ["²", "٣", "9" * 5_000])
def test_numbers_that_int_refuses_or_reads_otherwise(number: str) -> None:
    assert main(["plan", "--cfg", "x.yaml", "--gpus", number]) == BAD_INPUT
    with pytest.raises(InputError, match="is not a seed"):
        parse_seed(number, "SEED")
    with pytest.raises(InputError, match="is not a number of jobs"):
        parse_plan(number, ("0",))
    with pytest.raises(InputError, match="has checkpoints of steps: none"):
        find_checkpoint(Path("nowhere"), number)


def test_a_key_that_undoes_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, "tiny", "mamba")
    assert main(["train", "--cfg", str(config), "peft.r=4", "peft="]) == BAD_INPUT
    assert "peft would undo peft.r (command line)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["\x85", "a\x85b", "a\u2028b", "a\u2029", "a\rb", "a\r\nb\n", "\ufeff"]
)
def test_line_breaks_that_only_some_know_are_kept(text: str) -> None:
    values = {"a": text, "b": {text: 1}, "c": [text]}
    assert parse_yaml(dump(values), "x").values == values


def test_two_billion_jobs_are_refused_at_once() -> None:
    with pytest.raises(InputError, match="from 0 to 64"):
        parse_plan("2147483648", ("0",))


def test_a_closed_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["slurm"]) == BAD_INPUT


def test_yaml_s_own_words_for_types_are_still_text() -> None:
    assert parse_yaml("a: 'x !!int'\nb: 2026-01-01\n", "x").values == {
        "a": "x !!int",
        "b": "2026-01-01",
    }


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    "task",
    [
        {"template": "{{ messages[0]['role'] + 1 }}"},
        {"template": "{{ 1 / 0 }}"},
        {"template": "{% for i in range(10 ** 9) %}{% endfor %}"},
        {"template": "plain", "variables": {"messages": 1}},
        {"template": "plain", "variables": {"tools": 1}},
    ],
)
def test_a_chat_template_that_fails(task: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match="the chat template refuses the messages"):
        build_task({"type": "chat", **task}).render({"messages": turns}, training=True)


def test_a_table_that_begins_with_an_empty_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n\nx,y\n1,2\n")
    assert list(read_records(tmp_path / "a.csv").rows) == [(4, {"x": "1", "y": "2"})]


def test_metrics_that_end_in_something_else(tmp_path: Path) -> None:
    row = '{"split": "train", "step": 1}\n'
    for torn in ("1", "[]", '{"step": "x"}', '{"step"', "\xff"):
        (tmp_path / "metrics.jsonl").write_text(row + torn, encoding="latin-1")
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


# ---------------------------------------------------------------- checkpoints

STATE = {"train": {"step": 1}, "stage": "train", "global_batch": 4, "scaler": None}


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return checkpoint.save_checkpoint(
        tmp_path, 1, {"trainable": {"w": torch.ones(1)}}, STATE, [snapshot.collect_rng()]
    )


def write_signed(path: Path, **changes: Any) -> None:
    """A manifest that vouches for itself, and for the files that are there."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        entry.update(size=(path / name).stat().st_size, sha256=digest(path / name))
    manifest |= changes
    text = json.dumps({**manifest, "sha256": own_digest(manifest)})
    (path / MANIFEST).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": None}, {"world_size": "x"}, {"files": []}, {"files": {"a": 1}},
        {"files": {"../../outside": {"size": 0, "sha256": ""}}}, {"files": {"a": {"size": 1}}},
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape(changes: dict[str, Any], step: Path, tmp_path: Path) -> None:
    write_signed(step, **changes)
    path, skipped = checkpoint.latest_checkpoint(tmp_path)
    assert path is None and "does not describe the files of a checkpoint" in skipped[0]
    with pytest.raises(InputError, match="does not describe"):
        checkpoint.load_checkpoint(step)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b"\x80"), ("state.json", b"{"), ("state.json", b"[" * 100_000),
        ("rng-00000.json", b"x"), ("trainable.safetensors", b"\xff" * 20),
    ],
)  # fmt: skip
def test_a_signed_file_that_cannot_be_read(
    name: str, content: bytes, step: Path, tmp_path: Path
) -> None:
    (step / name).write_bytes(content)
    write_signed(step)
    with pytest.raises(InputError, match="it cannot be read"):
        find_resume_point(tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        3, [], {}, STATE | {"train": 1}, STATE | {"train": {"step": "x"}}, STATE | {"stage": "x"},
        STATE | {"train": {"steps": 1}}, STATE | {"global_batch": 0}, STATE | {"scaler": 1},
    ],
)  # fmt: skip
def test_a_signed_state_that_no_run_wrote(state: Any, step: Path, tmp_path: Path) -> None:
    (step / "state.json").write_text(json.dumps(state))
    write_signed(step)
    with pytest.raises(InputError, match="not what a run wrote"):
        find_resume_point(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"python": [None, [], None]}, {"python": [3, [1], None]}, {"python": 1},
        {"torch": "\x80"}, {"torch": "abc"}, {"torch": ""}, {"numpy": None}, {"numpy": {}},
    ],
)  # fmt: skip
def test_random_states_that_no_run_wrote(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="random states are not what a run wrote"):
        snapshot.restore_rng(snapshot.collect_rng() | changes)


@pytest.mark.parametrize("content", [b"", b"step-x", b"\xff", b"step-" + b"9" * 5_000])
def test_a_pointer_that_names_no_step(content: bytes, step: Path, tmp_path: Path) -> None:
    (step.parent / "last").write_bytes(content)
    assert checkpoint.read_pointer(tmp_path, "last") is None
    with pytest.raises(InputError, match="has checkpoints of steps: 1"):
        find_checkpoint(tmp_path, "last")


# ---------------------------------------------------------------- models and adapters


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    new_model = {"model_type": "mamba", "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1}
    spec = ModelSpec(new_model=new_model, kernels="reference")
    prepared = resolve(spec)[0].prepare(spec)
    save_model(prepared.model, directory)
    build_tokenizer(["a b c d"], {"type": "word"}).save_pretrained(directory)
    peft = load_peft({"peft_type": "LORA", "r": 1})
    assert peft is not None
    peft.make().inject(prepared)
    traits = prepared.traits
    export_adapter(prepared.model, directory / "adapter", base_id=None, traits=traits)
    return directory


def load(directory: Path) -> Any:
    spec = ModelSpec(model=str(directory), kernels="reference")
    return resolve(spec)[0].prepare(spec).model


MISREAD = [
    *(("config.json", text) for text in ("3", "[" * 100_000, "\xff")),
    *(
        ("config.json", {key: value})
        for key, value in (
            *(("hidden_act", "x"), ("dtype", [1]), ("quantization_config", 3)),
            *(("hidden_size", -1), ("rope_scaling", 1), ("num_hidden_layers", None)),
        )
    ),
    *(("tokenizer.json", text) for text in ("{}", "3", '{"version": "1.0", "model": {}}')),
    *(("tokenizer_config.json", {"tokenizer_class": value}) for value in ([], 3)),
    *(("tokenizer_config.json", {"eos_token": 3}), ("added_tokens.json", "3")),
    *(("special_tokens_map.json", "3"), ("generation_config.json", "3")),
]


@pytest.mark.parametrize(("name", "content"), MISREAD, ids=lambda value: str(value)[:40])
def test_a_file_of_a_model_that_cannot_be_read(
    name: str, content: Any, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    "changes", [{"arrow_config": "x"}, {"alpha_pattern": "x"}, {"revision": ["x"]}, {"r": None}]
)
def test_settings_of_an_adapter_that_are_none(
    changes: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if "revision" in changes:
        load_adapter(load(model), tmp_path / "adapter")  # says nothing of a commit
    else:
        with pytest.raises(InputError, match="does not fit this base model"):
            load_adapter(load(model), tmp_path / "adapter")


def test_a_run_s_records_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, "tiny", "mamba", max_steps=1, skip_eval=True, eval_steps=None)
    run_dir = tmp_path / "output/train_seed42/tiny"
    run_dir.mkdir(parents=True)
    (run_dir / "cfg.yaml").write_text(config.read_text() + "name: tiny\n")
    for text in ("{", "[]", '{"directory": 1}', '{"directory": "x", "sha256": []}'):
        (run_dir / "base.json").write_text(text)
        assert main(["eval", str(run_dir)]) == BAD_INPUT
        assert "base.json" in capsys.readouterr().err
