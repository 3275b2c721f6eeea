"""The pages hold: files exist, commands parse, configs load, tables are those of the schema.

`python tests/unit/test_docs.py` prints the tables for docs/running.md and docs/peft.md.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from ssm_train.adapters.base import ModelSettings
from ssm_train.checkpoint import CheckpointSettings
from ssm_train.cli import build_parser
from ssm_train.commands import overrides_of
from ssm_train.config import RunConfig, load_config, run_directory
from ssm_train.data import DataSettings
from ssm_train.errors import InputError
from ssm_train.evaluate import EvalSettings
from ssm_train.metrics import MetricsSettings
from ssm_train.optim import OptimSettings
from ssm_train.overrides import DIRECTORIES, ENVIRONMENT
from ssm_train.peft.lora import LoraSettings
from ssm_train.peft.spec import load_peft
from ssm_train.schedule import LoopSettings

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "ssm_train").rglob("*.md")),
]
RECIPE = "adding_a_model.md"  # its files are the reader's to make; it has a test of its own
SHELL = ("bash", "sh", "console")
PARTS = {
    "model": ModelSettings,
    "data": DataSettings,
    "optimizer": OptimSettings,
    "length of the run": LoopSettings,
    "evaluation": EvalSettings,
    "checkpoints": CheckpointSettings,
    "metrics": MetricsSettings,
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def code_spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


# ---------------------------------------------------------------- the file tree


def tree_entries(text: str) -> Iterator[str]:
    """Paths of an indented tree, two spaces a level; directories end with a slash."""
    parents: list[str] = []
    for line in text.splitlines():
        if not line.strip():
            continue
        level = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents = [*parents[:level], name]
        yield "".join(parents)


def tree() -> list[str]:
    (text,) = [block for block in blocks(PAGES[0], "text") if "ssm_train/\n" in block]
    return list(tree_entries(text))


def test_the_file_tree_names_only_what_exists() -> None:
    entries = tree()
    assert not [entry for entry in entries if not (ROOT / entry).exists()]
    assert len(entries) == len(set(entries))


def test_the_file_tree_is_complete() -> None:
    entries = tree()
    opened = {str(Path(entry).parent) + "/" for entry in entries}
    closed = [entry for entry in entries if entry.endswith("/") and entry not in opened]
    missing = [
        path
        for file in sorted((ROOT / "ssm_train").rglob("*.py"))
        if (path := str(file.relative_to(ROOT))) not in entries
        and not path.startswith(tuple(closed))
        and not (path.endswith("/__init__.py") and path.removesuffix("__init__.py") in entries)
    ]
    assert not missing, f"not in README's file tree: {missing}"


def test_the_tree_is_read_by_its_indentation() -> None:
    text = "a/\n  b.py   what\n  c/\n    d.py  what\ne.py\n"
    assert list(tree_entries(text)) == ["a/", "a/b.py", "a/c/", "a/c/d.py", "e.py"]


# ---------------------------------------------------------------- names of files and tests


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        if name.startswith("http"):
            continue
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@each_page
def test_named_files_and_tests_exist(page: Path) -> None:
    if page.name == RECIPE:
        return
    for span in code_spans(page):
        match = re.fullmatch(r"((?:ssm_train|tests|docs|cfg|benchmarks)/[\w./]+)(?:::(\w+))?", span)
        if match is None:
            continue
        assert (ROOT / match[1]).exists(), f"{page.name}: {span}"
        if match[2]:
            source = (ROOT / match[1]).read_text(encoding="utf-8")
            assert f"def {match[2]}(" in source, f"{page.name}: {span}"


# ---------------------------------------------------------------- commands


def command_lines(page: Path) -> Iterator[str]:
    """Shell lines of a page, and commands inside its sentences."""
    for block in blocks(page, *SHELL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.strip().removeprefix("$ ")
    for span in code_spans(page):
        if re.fullmatch(r"ssm-train \w+", span):  # a command's name in a sentence
            yield f"{span} --help"
        elif span.startswith(("ssm-train ", "python train.py ", "python -m ", "make ")):
            yield span


def split_command(line: str) -> tuple[dict[str, str], list[str]]:
    """Environment assignments in front of a command, and its words."""
    words = shlex.split(line, comments=True)
    variables = {}
    while words and re.fullmatch(r"[A-Z][A-Za-z_]*=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return variables, words


def our_arguments(words: list[str]) -> list[str] | None:
    """The arguments of `ssm-train` in a command line; None for another program's."""
    if words[:1] == ["ssm-train"]:
        return words[1:]
    if words[:2] == ["python", "train.py"]:
        return ["train", *words[2:]]
    if "ssm_train.train" in words:
        return ["train", *words[words.index("ssm_train.train") + 1 :]]
    return None


def check_our_command(arguments: list[str], variables: dict[str, str]) -> None:
    """Parses it as `cli.main` would; where its config exists, reads that with its changes too."""
    parser = build_parser()
    if arguments[-1] == "--help":
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
        return
    parsed, rest = parser.parse_known_args(arguments)
    parsed.rest = [word for word in rest if "=" in word and not word.startswith("-")]
    assert parsed.rest == rest, f"unknown arguments {rest}"
    assert not rest or parsed.command == "train"
    if parsed.command == "train" and str(parsed.cfg).startswith("cfg/"):
        load_config(ROOT / parsed.cfg, overrides_of(parsed), variables)


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):(?!=)", makefile, re.M)
    for word in words:
        name, equals, _ = word.partition("=")
        if equals:
            assert re.search(rf"^{name} \?=", makefile, re.M), f"Makefile has no variable {name}"
        else:
            assert name in targets, f"Makefile has no target {name}"


@each_page
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in command_lines(page):
        variables, words = split_command(line)
        unknown = {v for v in variables if v.startswith("HP_")} - set(ENVIRONMENT)
        assert not unknown, f"{page.name}: {unknown}"
        if words[:1] == ["make"]:
            check_make(words[1:])
        elif (arguments := our_arguments(words)) is not None:
            try:
                check_our_command(arguments, variables)
            except InputError as error:
                pytest.fail(f"{page.name}: {line}: {error}")
        for word in words:
            if re.match(r"(tests|benchmarks|cfg)/", word):
                assert (ROOT / word.partition("::")[0]).exists(), f"{page.name}: {line}"


@each_page
def test_jobs_have_the_precision_of_their_config(page: Path) -> None:
    for line in command_lines(page):
        variables, words = split_command(line)
        job = next((w for w in words if w.startswith("slurm/train_")), None)
        if words[:1] == ["sbatch"] and job is not None:
            source = (ROOT / job).read_text(encoding="utf-8")
            assert (default := re.search(r"\$\{PREC:-(\w+)\}", source)), job
            cfg, _ = load_config(ROOT / words[words.index(job) + 1])
            assert variables.get("PREC", default[1]) == cfg.prec, f"{page.name}: {line}"


def examples_of_help() -> dict[str, str]:
    """Command -> the example at the end of its help."""
    (commands,) = (a.choices for a in build_parser()._actions if a.dest == "command")
    assert isinstance(commands, dict)
    return {name: parser.epilog.partition("\n")[2].strip() for name, parser in commands.items()}


@pytest.mark.parametrize("command", examples_of_help())
def test_examples_of_help_are_commands_on_runs_of_the_quickstart(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    _, words = split_command(examples_of_help()[command])
    arguments = our_arguments(words)
    assert arguments and arguments[0] == command
    check_our_command(arguments, {})
    runs = [
        run_directory(load_config(ROOT / f"cfg/quickstart/{name}.yaml")[0])
        for name in ("gla_lora", "mamba_lora")
    ]
    directories = [directory for run in runs for directory in (run, *run.parents)]
    for word in arguments:
        if word.startswith("output/"):
            assert any(directory.match(word) for directory in directories), word
        elif word.startswith("cfg/"):
            assert (ROOT / word).is_file(), word


WRONG_COMMANDS = [
    ["trian", "--cfg", "x.yaml"],
    ["trian", "--help"],
    ["eval"],
    ["eval", "run", "seed=7"],
    ["plot", "run", "--cut", "3"],
    ["train", "--cfg", "cfg/quickstart/gla_lora.yaml", "learning_rat=1e-3"],
]


@pytest.mark.parametrize("arguments", WRONG_COMMANDS, ids=" ".join)
def test_a_wrong_command_would_be_noticed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((InputError, AssertionError)):
        check_our_command(arguments, {})


@pytest.mark.parametrize("word", ["quickstrat", "TORHC=torch"])
def test_a_wrong_make_line_would_be_noticed(word: str) -> None:
    with pytest.raises(AssertionError, match="Makefile has no"):
        check_make([word])


# ---------------------------------------------------------------- configs


@each_page
def test_config_blocks_load(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for number, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"block{number}.yaml"
        path.write_text(block, encoding="utf-8")
        keys = set(re.findall(r"^(\w+):", block, re.M))
        assert keys <= set(RunConfig.model_fields), keys - set(RunConfig.model_fields)
        if "data" in keys and keys & {"model", "new_model"}:  # else a part of one
            cfg, _ = load_config(path)
            load_peft(cfg.peft, cfg.peft_overrides.given())
    for block in blocks(page, "json"):
        if "peft_type" in (values := json.loads(block)):
            load_peft(values)


# ---------------------------------------------------------------- tables


def type_text(annotation: Any) -> str:
    """`int | None` as "int": what null means, the description says."""
    if get_origin(annotation) is Annotated:
        return type_text(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [type_text(kind) for kind in get_args(annotation) if kind is not type(None)]
        return " or ".join(kinds)
    names = {dict: "mapping", list: "list", str: "text"}
    kind = get_origin(annotation) or annotation
    return names.get(kind, kind.__name__)


def default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return json.dumps(field.get_default(call_default_factory=True)).strip('"')


def row(key: str, field: FieldInfo, variable: str) -> str:
    assert field.description, f"{key} has no description"
    meaning = " ".join(field.description.split()).replace("|", "\\|")
    variable = f"`{variable}`" if variable else ""
    return (
        f"| `{key}` | {type_text(field.annotation)} | {default_text(field)} | {variable} "
        f"| {meaning} |"
    )


def config_table() -> list[str]:
    """Every key of a run config, in the order of its parts; `peft_overrides` is in docs/peft.md."""
    variables = {key: variable for variable, key in ENVIRONMENT.items()}
    variables |= {key: variable for variable, key in DIRECTORIES.items()}
    lines = ["| key | type | default | variable | meaning |", "|---|---|---|---|---|"]
    inherited = {key for part in PARTS.values() for key in part.model_fields}
    own = [key for key in RunConfig.model_fields if key not in inherited | {"peft_overrides"}]
    parts: dict[str, list[str]] = {name: list(p.model_fields) for name, p in PARTS.items()}
    for name, keys in {"the run": own, **parts}.items():
        lines.append(f"| **{name}** | | | | |")
        lines += [row(key, RunConfig.model_fields[key], variables.get(key, "")) for key in keys]
    return lines


def lora_table() -> list[str]:
    """Every key of a LoRA JSON with its HP_* variable."""
    variables = {key.rpartition(".")[2]: v for v, key in ENVIRONMENT.items() if "." in key}
    return [
        "| key | type | default | variable | meaning |",
        "|---|---|---|---|---|",
        *(row(k, f, variables.get(k, "")) for k, f in LoraSettings.model_fields.items()),
    ]


TABLES = {"running.md": config_table, "peft.md": lora_table}


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_the_schema_s(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    table = "\n".join(TABLES[page]())
    assert table in text, f"docs/{page}: the table is not the schema's; see this file's first lines"


def test_tables_hold_every_key() -> None:
    shown = set(re.findall(r"^\| `(\w+)`", "\n".join(config_table()), re.M))
    assert shown == set(RunConfig.model_fields) - {"peft_overrides"}


def test_every_variable_is_described() -> None:
    pages = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in TABLES)
    assert not [variable for variable in ENVIRONMENT if f"`{variable}`" not in pages]


if __name__ == "__main__":
    for name, table in TABLES.items():
        sys.stdout.write("\n".join([f"docs/{name}:", *table(), "", ""]))
