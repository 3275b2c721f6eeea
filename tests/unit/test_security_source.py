"""What the package's source never does: run a shell, or load what can hold code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    *sorted((ROOT / "ssm_train").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
    *sorted((ROOT / "scripts").rglob("*.py")),
    ROOT / "train.py",
]
STARTS = ("run", "Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput")
NEVER = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "yaml.load_all",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load",
    "cloudpickle.load", "cloudpickle.loads", "marshal.loads", "shelve.open", "tempfile.mktemp",
    "torch.hub.load", "pandas.read_pickle", "datasets.load_from_disk",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or an attribute; of another expression, `.attribute`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(tree: ast.AST) -> Iterator[str]:
    """(line, what) of calls and imports that must not be there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None)
            for alias in node.names:
                name = f"{module}.{alias.name}" if module else alias.name
                allowed = name == "pickle.UnpicklingError"  # to be caught
                if name.split(".")[0] in ("pickle", "dill", "marshal", "shelve") and not allowed:
                    yield f"{node.lineno}: imports {name}"
                if module == "subprocess" or name == "os.system":
                    yield f"{node.lineno}: takes {name} out of its module"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in NEVER:
            yield f"{node.lineno}: {name}"
        if name == "torch.load" and not is_constant(given.get("weights_only"), True):
            yield f"{node.lineno}: torch.load without weights_only=True"
        if name in ("np.load", "numpy.load") and not is_constant(given.get("allow_pickle"), False):
            yield f"{node.lineno}: {name} without allow_pickle=False"
        if name.endswith("AutoTokenizer.from_pretrained") and not is_constant(
            given.get("trust_remote_code"), False
        ):
            yield f"{node.lineno}: {name} without trust_remote_code=False"
        if is_constant(given.get("trust_remote_code"), True):
            yield f"{node.lineno}: {name} with trust_remote_code=True"
        if name in {f"subprocess.{start}" for start in STARTS}:
            if "shell" in given:
                yield f"{node.lineno}: {name} with shell="
            if isinstance(node.args[0], ast.Constant | ast.JoinedStr):
                yield f"{node.lineno}: {name} of one text"


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_runs_no_shell_and_loads_no_code(path: Path) -> None:
    assert not list(offences(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "line",
    [
        *("eval(x)", "exec(x)", "os.system(x)", "import pickle", "from pickle import loads"),
        *("yaml.load(x)", "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x)"),
        *("numpy.load(x, allow_pickle=True)", "subprocess.run(x, shell=True)", "import dill"),
        *('subprocess.run("ls")', 'subprocess.Popen(f"ls {x}")', "from subprocess import run"),
        *("AutoTokenizer.from_pretrained(x)", "load(x, trust_remote_code=True)"),
    ],
)
def test_an_offence_is_found(line: str) -> None:
    assert list(offences(ast.parse(line)))


def test_what_is_allowed_is_no_offence() -> None:
    allowed = """
from pickle import UnpicklingError
import subprocess
torch.load(x, weights_only=True)
np.load(x, allow_pickle=False)
subprocess.run(["ls", x])
model.eval()
load(x).eval()
re.compile(x)
"""
    assert not list(offences(ast.parse(allowed)))
