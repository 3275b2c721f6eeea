"""Who may import whom, read from the source and seen in a fresh process."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ssm_train

PACKAGE = Path(ssm_train.__file__).parent
HEAVY = {"fla", "mamba_ssm", "causal_conv1d", "deepspeed", "liger_kernel", "wandb", "tensorboard"}
MODEL_LIBRARIES = {"transformers", "peft", "fla", "mamba_ssm"}
CONCRETE_ADAPTERS = {
    f"ssm_train.adapters.{path.stem}"
    for path in (PACKAGE / "adapters").glob("*.py")
    if path.stem != "base" and "Adapter:" in path.read_text(encoding="utf-8")
}


# Parts of one concrete adapter, which nobody else imports.
PARTS_OF_ADAPTERS = {"ssm_train.adapters.gla_mixer", "ssm_train.adapters.gla_triton"}

# The composition root and its neighbours: a run's making, its stages, bases, from a config to its
# parts, a run loaded again, what is tuned for one, which runs of a suite are done, and the old
# code's functions.
COMPOSITION = tuple(
    f"ssm_train.{name}"
    for name in (
        *("train", "fit", "ready", "bases", "assemble", "finished", "shape", "warmup", "plan"),
        "health.preflight",
        "scaling",
        "verify_resume",
        "rerun",
        "launch.complete",
        "mamba_peft.models",
        "mamba_peft.training",
    )
)


@dataclass(frozen=True)
class Import:
    """One imported name, as the source says it."""

    importer: str
    target: str
    line: int
    at_import_time: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"

    def reaches(self, module: str) -> bool:
        return self.target == module or self.target.startswith(f"{module}.")


def imports_in(path: Path, importer: str) -> Iterator[Import]:
    """Imports of a file, those inside functions and under TYPE_CHECKING marked as later."""

    def walk(node: ast.AST, now: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for name in child.names:
                    yield Import(importer, name.name, child.lineno, now)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    is_package = path.name == "__init__.py"
                    parents = importer.split(".")
                    kept = parents[: len(parents) - child.level + is_package]
                    base = ".".join([*kept, *([child.module] if child.module else [])])
                for name in child.names:
                    yield Import(importer, f"{base}.{name.name}", child.lineno, now)
            else:
                later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                later |= isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
                yield from walk(child, now and not later)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


IMPORTS = [
    found for path in sorted(PACKAGE.rglob("*.py")) for found in imports_in(path, module_name(path))
]


def below(*modules: str) -> list[Import]:
    return [
        i
        for i in IMPORTS
        if any(i.importer == m or i.importer.startswith(f"{m}.") for m in modules)
    ]


def list_offences(imports: list[Import]) -> str:
    return "\n".join(map(str, imports))


def test_kernels_import_torch_triton_and_the_standard_library_only() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    wrong = [
        i
        for i in below("ssm_train.kernels")
        if i.target.partition(".")[0] not in allowed and not i.reaches("ssm_train.kernels")
    ]
    assert not wrong, list_offences(wrong)
    assert below("ssm_train.kernels"), "the rule looked at nothing"


def test_components_do_not_import_the_config() -> None:
    wrong = [
        i
        for i in IMPORTS
        if i.reaches("ssm_train.config")
        and i.importer
        not in ("ssm_train", "ssm_train.commands", "ssm_train.contradictions", *COMPOSITION)
    ]
    assert not wrong, list_offences(wrong)


def test_only_the_command_line_imports_the_composition_root() -> None:
    commands = ("commands", "verify_resume", "rerun", "mamba_peft.training")
    allowed = {"ssm_train", *(f"ssm_train.{name}" for name in commands)}
    wrong = [i for i in IMPORTS if i.reaches("ssm_train.train") and i.importer not in allowed]
    assert not wrong, list_offences(wrong)


def test_adapters_and_peft_know_nothing_of_training() -> None:
    training = ("loop", "data", "checkpoint", "evaluate", "metrics", "optim", "record")
    composition = ("ready", "train")
    wrong = [
        i
        for i in below("ssm_train.adapters", "ssm_train.peft")
        if any(i.reaches(f"ssm_train.{module}") for module in training + composition)
    ]
    assert not wrong, list_offences(wrong)


def test_the_loop_knows_no_model_library_and_no_concrete_adapter() -> None:
    knowing_nothing = ("loop", "best_step", "optim", "distributed")
    wrong = [
        i
        for i in below(*(f"ssm_train.{name}" for name in knowing_nothing))
        if i.target.partition(".")[0] in MODEL_LIBRARIES
        or any(i.reaches(adapter) for adapter in CONCRETE_ADAPTERS)
        or i.reaches("ssm_train.peft")
    ]
    assert not wrong, list_offences(wrong)


def test_concrete_adapters_are_imported_lazily() -> None:
    wrong = [
        i
        for i in IMPORTS
        if i.at_import_time
        and i.importer not in CONCRETE_ADAPTERS
        and any(i.reaches(adapter) for adapter in CONCRETE_ADAPTERS)
    ]
    assert not wrong, list_offences(wrong)
    assert "ssm_train.adapters.gla" in CONCRETE_ADAPTERS, "the rule looked at nothing"


def test_heavy_packages_are_imported_where_they_are_needed() -> None:
    wrong = [
        i
        for i in IMPORTS
        if i.at_import_time
        and i.target.partition(".")[0] in HEAVY
        and i.importer not in CONCRETE_ADAPTERS | PARTS_OF_ADAPTERS
    ]
    wrong += [
        i
        for i in IMPORTS
        if any(i.reaches(part) for part in PARTS_OF_ADAPTERS)
        and i.importer not in CONCRETE_ADAPTERS | PARTS_OF_ADAPTERS
    ]
    assert not wrong, list_offences(wrong)


def test_evaluation_checkpoints_and_metrics_do_without_the_accelerator() -> None:
    wrong = [
        i
        for i in below("ssm_train.evaluate", "ssm_train.checkpoint", "ssm_train.metrics")
        if i.target.rpartition(".")[2] == "Accelerator" or i.target == "accelerate"
    ]
    assert not wrong, list_offences(wrong)


def test_a_missing_package_is_never_turned_into_none() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path.name}:{node.lineno}: bare except"
                if "ImportError" in ast.dump(node.type):
                    assigned = [n for n in node.body if isinstance(n, ast.Assign)]
                    assert not assigned, f"{path.name}:{node.lineno}: optional import set to None"


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """What one fresh process has in `sys.modules` after each import, in this order."""
    steps = ["ssm_train", "ssm_train.cli", "ssm_train.loop", "ssm_train.config"]
    program = f"""
import importlib, json, sys
seen = {{}}
for step in {steps!r}:
    importlib.import_module(step)
    seen[step] = sorted({{name.partition(".")[0] for name in sys.modules}})
print(json.dumps(seen))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_importing_the_package_or_the_command_line_loads_no_torch(
    loaded: dict[str, list[str]],
) -> None:
    assert "torch" not in loaded["ssm_train"]
    assert "torch" not in loaded["ssm_train.cli"]


@pytest.mark.parametrize("module", ["ssm_train.loop", "ssm_train.config"])
def test_the_loop_and_the_config_load_no_model_library(
    loaded: dict[str, list[str]], module: str
) -> None:
    assert "torch" in loaded[module], "the rule looked at nothing"
    assert not MODEL_LIBRARIES & set(loaded[module])


def test_the_rules_would_notice(tmp_path: Path) -> None:
    source = "from . import train\nfrom ..config import x\ndef f():\n    import fla.ops\n"
    (tmp_path / "gla.py").write_text(source)
    found = list(imports_in(tmp_path / "gla.py", "ssm_train.adapters.gla"))
    assert [i.target for i in found] == [
        "ssm_train.adapters.train",
        "ssm_train.config.x",
        "fla.ops",
    ]
    assert [i.at_import_time for i in found] == [True, True, False]
