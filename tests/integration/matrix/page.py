"""docs/support_matrix.md: how a test run writes it, and what it says, read back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from matrix.cell import BOUND, DEVICE
from matrix.checks import GRADIENTS, Verdict
from matrix.methods import FAMILIES, METHODS

PAGE = Path(__file__).parents[3] / "docs" / "support_matrix.md"
TITLES = {"gla": "GLA", "mamba": "Mamba-1", "mamba2": "Mamba-2", "bamba": "Bamba"}

Names = tuple[str, str, str]
"""Method, family, precision; for a refusal the precision is empty."""
Texts = dict[Names, list[str]]


def write_page(
    verdicts: Mapping[Names, Mapping[str, Verdict]], refusals: Mapping[Names, str]
) -> str:
    """Markdown of all verdicts, by column, and of the refusals."""
    notes: dict[str, int] = {}
    parts = [describe_columns()]
    columns = list(next(iter(verdicts.values())))
    for family in FAMILIES:
        rows = [
            [METHODS[name].title, prec, *(shorten(v.text, notes) for v in found.values())]
            for (name, of, prec), found in verdicts.items()
            if of == family
        ]
        parts.append(f"## {TITLES[family]}\n" + table(["method", "precision", *columns], rows))
        lines = [
            [METHODS[name].title, text] for (name, of, _), text in refusals.items() if of == family
        ]
        if lines:
            parts.append(table(["refused", "what a run says"], lines))
    numbered = [f"{number}. {text}" for text, number in notes.items()]
    parts.append("## Notes\n" + "\n".join(numbered) + "\n")
    parts.append(
        "## Largest differences\nOf this run; another machine rounds otherwise. fp32: relative to "
        "the largest value; bf16: as a multiple of what plain bf16 has, but for merge and "
        "checkpointing.\n" + table(["column", "fp32", "bf16"], largest(verdicts))
    )
    settings = [
        [method.title, "null" if method.settings is None else f"`{json.dumps(method.settings)}`"]
        for method in METHODS.values()
    ]
    parts.append(
        "## Settings\n`peft` in the run's config. Names of layers, and ranks of small matrices, "
        "differ by family (`tests/integration/matrix/methods.py`).\n"
        + table(["method", "peft"], settings)
    )
    return "\n".join(parts)


def describe_columns() -> str:
    text = Path(__file__).with_name("introduction.md").read_text(encoding="utf-8")
    on_cpu = DEVICE.type == "cpu"
    return text.format(
        device="a CPU" if on_cpu else f"one {torch.cuda.get_device_name(DEVICE)}",
        torch=torch.__version__.split("+")[0],
        bound=f"{BOUND:.0e}",
        gradients=f"{GRADIENTS:.0e}",
    )


def shorten(text: str, notes: dict[str, int]) -> str:
    """`refused: why` as `refused [1]`, with the reason among the notes."""
    word, _, reason = text.partition(": ")
    return f"{word} [{notes.setdefault(reason, len(notes) + 1)}]" if reason else word


def largest(verdicts: Mapping[Names, Mapping[str, Verdict]]) -> list[list[str]]:
    rows = []
    for column in next(iter(verdicts.values())):
        row = [column]
        for prec in ("fp32", "bf16"):
            figures = [
                found[column].figure
                for (_, _, of), found in verdicts.items()
                if of == prec and found[column].figure is not None
            ]
            row.append(f"{max(figures):.1e}" if figures else "")
        rows.append(row)
    return rows


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_page(text: str) -> Texts:
    """What a page says of each cell, notes put back: the texts of its columns, or the refusal."""
    names = {method.title: name for name, method in METHODS.items()}
    families = {title: family for family, title in TITLES.items()}
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.M))
    found: Texts = {}
    family = None
    for line in text.splitlines():
        if line.startswith("## "):
            family = families.get(line[3:])
        words = [word.strip() for word in line.strip("|").split(" | ")]
        if family is None or words[0] not in names:
            continue
        name = names[words[0]]
        if len(words) == 2:
            found[name, family, ""] = words[1:]
            continue
        found[name, family, words[1]] = [
            re.sub(r" \[(\d+)\]$", lambda match: f": {notes[match[1]]}", word) for word in words[2:]
        ]
    return found
