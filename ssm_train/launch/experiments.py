"""The LoRA experiments on GLA: which there are, in which suites, and what a name stands for.
`python -m ssm_train.launch.experiments` writes their configs; `--check` says what differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_train.errors import InputError

DIRECTORY = "cfg/my_lora_exp"
MADE = "# Made by `python -m ssm_train.launch.experiments`: change the table there.\n"

# A brace stands for each of its words: X_{,DoRA_}r8 is X_r8 and X_DoRA_r8.
SUITES = {
    "E1": """
        E1_QKVO_r8_alpha16 E1_QKVO_r8_alpha8 E1_QKVO_r10_alpha16 E2_OMLP_r8_alpha16
        E1_QKVO_{r8_alpha12,r8_alpha20,r4_alpha8,r6_alpha12,r10_alpha20}
        E1_QKVO_{DoRA,RSLoRA}_r8_alpha16 E1_QKVO_{DoRA,RSLoRA}_r12_alpha24
        E1_QKVO_plus_G_{r8_alpha8,r8_alpha16} E1_QKVO_plus_GK_{r8_alpha8,r8_alpha16}
        E1_QKVO_plus_G_plus_GK_{r8_alpha8,r8_alpha16} E1_QKVO_plus_MLP_r8_alpha16
        E1_QKVO_plus_G_plus_GK_plus_MLP_r8_alpha16 E1_QKVO_plus_G_{DoRA,RSLoRA}_r8_alpha16
        E1_QKVO_plus_GK_{DoRA,RSLoRA}_r8_alpha16 E1_QKVO_plus_G_plus_GK_{DoRA,RSLoRA}_r8_alpha16
        E1_QKVO_{first6,last6}_r8_alpha16 E2_OMLP_{last6,middle6}_r8_alpha16
        E1_QKVO_{dropout0,lr5e-5,lr2e-4,loradrop0.05,wd0.01}_r8_alpha16
        E1_QKVO_r16_alpha32 E2_OMLP_{r8_alpha8,r8_alpha24,r6_alpha12,r12_alpha24}
        E2_OMLP_{plus_G,plus_GK,plus_G_plus_GK}_r8_alpha16
        E3_GATINGONLY_{,DoRA_,RSLoRA_}r8_alpha16 E6_QKONLY_{,DoRA_,RSLoRA_}r8_alpha16
        E7_KVONLY_{,DoRA_,RSLoRA_}r8_alpha16 E8_QK_plus_GATING_{,DoRA_,RSLoRA_}r8_alpha16
        E9_OplusHEAD_{,DoRA_,RSLoRA_}r8_alpha16
    """,
    # The best of E1.
    "E2": """
        E1_QKVO_{r8_alpha16,r8_alpha12,r8_alpha20,r16_alpha32}
        E1_QKVO_{DoRA,RSLoRA}_r8_alpha16 E1_QKVO_{DoRA,RSLoRA}_r12_alpha24
        E1_QKVO_{plus_G,plus_GK,plus_G_plus_GK,plus_MLP}_r8_alpha16
        E1_QKVO_{first6,last6,dropout0,wd0.01}_r8_alpha16 E2_OMLP_r8_alpha16
    """,
    # Gates and MLP beside the projections, at a rank of their own.
    "E3": """
        E3_QKVO_main_Gates_aux_r8a16_{r2a2,r4a4,r4a8}
        E3_QKVO_main_{MLP,GatesMLP}_aux_r8a16_r4a8
        E3_QKVO_main_Gates_aux_{RSLoRA,DoRA}_r8a16_r4a4 E3_QKVO_plus_{G,GK}_only_r4a4
    """,
    # The favourites on another seed.
    "E4": """
        round4_QKVO_{r8,plus_GK_r8}_a16_seed127 round4_DoRA_QKVO_{r8,plus_GK_r8}_a16_seed127
        round4_RSLORA_QKVO_{r8,plus_GK_r8}_a16_seed127
    """,
    # One group alone.
    "E5": """
        E4_{Q,K,V}ONLY_r8_alpha16 E11_OONLY_r8_alpha16 E7_{G,GK}ONLY_r8_alpha16
        E3_GATINGONLY_r8_alpha16 E4_MLPONLY_r8_alpha16
    """,
    # Pairs and a triple of the attention's projections.
    "E6": """
        E6_{QK,QV,QO,KO,VO}ONLY_r8_alpha16 E7_KVONLY_r8_alpha16 E6_QKV_r8_alpha16
    """,
    # Rank, scale and learning rate.
    "E7": """
        E1_QKVO_{r2_alpha4,r4_alpha8,r6_alpha12,r8_alpha16,r10_alpha20,r12_alpha24,r16_alpha32}
        E1_QKVO_r8_{alpha8,alpha12,alpha20} E1_QKVO_r10_alpha16
        E2_OMLP_{r6_alpha12,r8_alpha8,r8_alpha16,r8_alpha24,r12_alpha24}
        E1_QKVO_{lr5e-5,lr1e-4,lr2e-4}_r8_alpha16
    """,
    # The update unscaled: alpha is the rank.
    "E8": """
        E1_QKVO_{,DoRA_,RSLoRA_,first6_,last6_}r8_alpha8
        E1_QKVO_{plus_G,plus_GK,plus_G_plus_GK,plus_G_plus_GK_DORA}_r8_alpha8
        QKVO_plus_G_RSLoRA_r8_a8 E2_OMLP_{,DoRA_,RSLoRA_}r8_alpha8 E2_OMLP_plus_G_r8_a8
        E3_GATINGONLY_r8_alpha8 E5_MLPONLY_r8_alpha8 E7_GONLY_r8_alpha8
    """,
    # The output head.
    "E9": """
        E9_OplusHEAD_{,DoRA_,RSLoRA_}r8_alpha16 E9_HEADONLY_r8_alpha16
        E9_QKVO_plus_HEAD_r8_alpha16
    """,
    # High capacity.
    "E10": """
        E1_QKVO_R16_r16_alpha16 E1_QKVO_{,DoRA_,RSLoRA_}r16_alpha32 QKVO_plus_G_r16_a16
        E1_QKVO_plus_MLP_r16_alpha16 E2_OMLP_r16_alpha32
        E1_QKVO_plus_G_plus_GK_plus_MLP_{r8_alpha16,r16_alpha32}
    """,
}

# As YAML text; `peft` is each experiment's own.
RUN = {
    "model": "fla-hub/gla-1.3B-100B",
    "data": "glue-tvt_cola",
    "batch_size": "4",
    "num_epochs": "10",
    "learning_rate": "3e-4",
    "prec": "bf16",
    "no_save": "false",
}

GATES = ("attn.g_proj", "attn.gk_proj.0", "attn.gk_proj.1")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GROUPS = {
    "G": GATES[:1],
    "GK": GATES[1:],
    "GATING": GATES,
    "Gates": GATES,
    "MLP": MLP,
    "OMLP": ("attn.o_proj", *MLP),
    "GatesMLP": (*GATES, *MLP),
    "HEAD": ("lm_head",),
}
"""Group -> modules; letters of QKVO are a group too: the attention's projections."""

WORDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "DORA": {"use_dora": True},
    "RSLoRA": {"use_rslora": True},
    "RSLORA": {"use_rslora": True},
    "dropout0": {"lora_dropout": 0.0},
    "loradrop0.05": {"lora_dropout": 0.05},
    "first6": {"layers_to_transform": [0, 1, 2, 3, 4, 5]},
    "middle6": {"layers_to_transform": [9, 10, 11, 12, 13, 14]},
    "last6": {"layers_to_transform": [18, 19, 20, 21, 22, 23]},
}
"""What a word of a name sets in the LoRA JSON."""

NUMBERS = {"lr": "learning_rate", "wd": "weight_decay", "seed": "seed"}
"""Word with a number behind it -> key of the run config."""

NAME = re.compile(
    rf"""
    (?:(?:E\d+|round4)_)?                           # a label
    (?P<method>(?:DoRA_|RSLORA_)?)                  # round4 says the method first
    (?P<targets>[A-Za-z]+(?:_plus_[A-Z]+)*)         # QKVO_plus_G_plus_GK
    (?:_main_(?P<aux>[A-Za-z]+)_aux|_plus_(?P<only>[A-Z]+)_only)?  # at a rank of its own
    (?P<words>(?:_(?:{"|".join(WORDS)}|(?:lr|wd)[\d.e-]+))*)
    (?:_R(?P<again>\d+)(?=_r(?P=again)_))?          # one name says the rank twice
    (?P<ranks>_r\d+(?:a|_a|_alpha)\d+(?:_r\d+a\d+)?)
    (?P<seed>(?:_seed\d+)?)
    """,
    re.VERBOSE,
)
SHAPE = "[E<n>_]QKVO[_plus_<group>...][_<word>...]_r<rank>_alpha<alpha>"


@dataclass(frozen=True)
class Experiment:
    """One config: a name, and the two files that the name stands for."""

    name: str
    lora: dict[str, Any]
    """The LoRA JSON."""
    run: dict[str, str]
    """The run config but for `peft`; values as YAML text."""

    @property
    def lora_file(self) -> str:
        """Those that train QKVO at r 8, alpha 16 share one JSON; others have their own."""
        if self.lora == make_lora(modules_of("QKVO"), 8, 16):
            return "lora_qkvo_alpha2r_r8_a16.json"
        return f"lora_{re.sub(r'^E[0-9]+_', '', self.name)}.json"


def read_name(name: str) -> Experiment:
    """What a name such as E1_QKVO_plus_G_DoRA_r8_alpha16 stands for. Raises InputError."""
    match = NAME.fullmatch(name)
    ranks = re.findall(r"r(\d+)_?a(?:lpha)?(\d+)", match["ranks"]) if match else []
    if match is None or len(ranks) != (2 if match["aux"] else 1):
        raise InputError(
            f"experiment {name!r} is not {SHAPE}, with words of {', '.join(WORDS)}, "
            f"{', '.join(f'{word}<number>' for word in NUMBERS)}"
        )
    (r, alpha), *beside = [(int(rank), int(scale)) for rank, scale in ranks]
    if match["only"]:
        (r, alpha), beside = (8, 16), [(r, alpha)]
    groups = re.split("_?plus_?", match["targets"])
    modules = [m for group in groups for m in modules_of(group.removesuffix("ONLY"))]
    aux = modules_of(match["aux"] or match["only"]) if beside else ()
    lora = make_lora((*modules, *aux), r, alpha)
    for aux_r, aux_alpha in beside:
        lora["rank_pattern"] = dict.fromkeys(aux, aux_r)
        lora["alpha_pattern"] = dict.fromkeys(aux, aux_alpha)
    run = dict(RUN)
    for word in f"{match['method']}{match['words']}{match['seed']}".split("_"):
        lora |= WORDS.get(word, {})
        run |= {k: word.removeprefix(w) for w, k in NUMBERS.items() if word.startswith(w)}
    return Experiment(name, lora, run)


def modules_of(group: str) -> tuple[str, ...]:
    """The modules of a group, by the ends of their names. Raises InputError."""
    if group in GROUPS:
        return GROUPS[group]
    if not re.fullmatch("(?=.)Q?K?V?O?", group):
        raise InputError(f"group {group!r} is not one of {', '.join(GROUPS)}, or letters of QKVO")
    return tuple(f"attn.{letter.lower()}_proj" for letter in group)


def make_lora(modules: Sequence[str], r: int, alpha: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": sorted(modules),
    }


def expand(text: str) -> list[str]:
    """Words, those with braces once for each word inside."""
    names = []
    for word in text.split():
        before, brace, rest = word.partition("{")
        inside, _, after = rest.partition("}")
        names += [f"{before}{w}{after}" for w in inside.split(",")] if brace else [word]
    return names


def make_files() -> dict[str, str]:
    """Path below the directory of the experiments -> text, of every file there."""
    suites = {suite: list(dict.fromkeys(expand(text))) for suite, text in SUITES.items()}
    lines = [
        line for s, names in suites.items() for line in (f"{s}:", *(f"  - {n}" for n in names))
    ]
    files = {"suites.yaml": MADE + "\n".join(lines) + "\n"}
    for name in dict.fromkeys(name for names in suites.values() for name in names):
        experiment = read_name(name)
        run = experiment.run | {"peft": f"{DIRECTORY}/peft/{experiment.lora_file}"}
        files[f"yaml/{name}.yaml"] = MADE + "".join(f"{k}: {v}\n" for k, v in run.items())
        files[f"peft/{experiment.lora_file}"] = json.dumps(experiment.lora, indent=2) + "\n"
    return files


def write_files(directory: Path) -> None:
    """A file that is right keeps its time, which `--skip-done` of a suite looks at."""
    for name, text in make_files().items():
        path = directory / name
        if not path.is_file() or path.read_bytes() != text.encode():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def find_differences(directory: Path) -> list[str]:
    """A line for each file that is missing, is not as the table says, or is not in the table."""
    files = make_files()
    there = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    lines = []
    for name in sorted(files.keys() | there.keys()):
        if name not in there:
            lines.append(f"{name} is missing")
        elif name not in files:
            lines.append(f"{name} is not in the table; remove it")
        elif there[name] != files[name].encode():
            lines.append(f"{name} differs from the table")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the files, or checks them; 1 where the directory is not as the table says."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--directory", type=Path, default=Path(DIRECTORY), help=f"({DIRECTORY})")
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.check:
            write_files(arguments.directory)
        differences = find_differences(arguments.directory)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for line in differences:
        sys.stdout.write(f"{arguments.directory}/{line}\n")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
