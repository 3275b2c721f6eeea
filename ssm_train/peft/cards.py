"""The README.md beside exported weights: what they are, how they load, and where they must not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from ssm_train.peft.tuner import OwnConfig

ADAPTER = """\
---
{base}library_name: peft
tags:
- lora
- ssm_train
---
# Adapter for {name}
{method} of rank {rank} on {targets}, trained with ssm_train.
{note}
```python
{imports}
model = AutoModelForCausalLM.from_pretrained({id!r})
model = PeftModel.from_pretrained(model, "path/of/this/directory")
```
"""

SSM_NOTE = """
`peft_type` is SSM_LORA because PEFT by itself would refuse some of these modules on the stock
model, or load them without any effect: its fused kernels read their weights directly. So PEFT
alone stops with an error. `import ssm_train.peft` teaches it the type and makes the loaded model
call every adapted module. For an install without ssm_train, write full weights with
`ssm-train merge`.
"""

OWN = """\
---
{base}library_name: peft
tags:
- {tag}
- ssm_train
---
# {method} for {name}
{count} modules trained by the method {method} of ssm_train ({where}). PEFT alone does not know the
type and stops with an error; `import ssm_train.peft` teaches it.
```python
{imports}
model = AutoModelForCausalLM.from_pretrained({id!r})
model = PeftModel.from_pretrained(model, "path/of/this/directory")
```
"""

MERGED = """\
---
{base}library_name: {library}
tags:
- ssm_train
---
# {name} with an adapter merged
Full weights in {dtype}, {loads}.
Over {tokens} probe tokens the logits differ from those of base plus adapter by {difference:.1e} of
their size (root mean square).
{note}
"""

# File format -> the hub's name of its library, and what loads it.
FORMATS = {
    "transformers": (
        "transformers",
        "in the format of transformers: what loads the base loads them, without ssm_train",
    ),
    "mamba_ssm": (
        "mamba-ssm",
        "in the format of mamba_ssm, for its `MambaLMHeadModel.from_pretrained`",
    ),
}

MERGED_NOTE = """
The adapter itself sits on modules that PEFT alone refuses on the stock model or loads without
effect, which is why these weights exist.
"""


def adapter_card(config: Any, model: nn.Module) -> str:
    """Model card of an exported adapter, from its PEFT config and the model it was trained on."""
    name = one_line(config.base_model_name_or_path or "its base model")
    if isinstance(config, OwnConfig):
        return own_card(config, model, name)
    targets = config.target_modules
    ssm_lora = str(config.peft_type.value) != "LORA"
    return ADAPTER.format(
        base=base_line(name),
        name=name,
        id=name,
        method="DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA",
        rank=config.r,
        targets=targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        note=SSM_NOTE if ssm_lora else "",
        imports=import_lines(model, ssm_lora),
    )


def own_card(config: OwnConfig, model: nn.Module, name: str) -> str:
    """Model card of an adapter of one of our own methods."""
    modules = config.modules or []
    return OWN.format(
        base=base_line(name),
        name=name,
        id=name,
        tag=config.tuner.peft_name.lower(),
        method=config.tuner.peft_name,
        count=len(modules),
        where=", ".join(sorted({module.rpartition(".")[2] for module in modules})),
        imports=import_lines(model, True),
    )


def import_lines(model: nn.Module, ssm_train: bool) -> str:
    """What a script imports to load an adapter onto a model like this."""
    of_fla = any(cls.__module__.startswith("fla.") for cls in type(model).__mro__)
    lines = ["import fla.models  # the base model's classes"] if of_fla else []
    lines += ["import ssm_train.peft"] if ssm_train else []
    lines += ["from peft import PeftModel", "from transformers import AutoModelForCausalLM"]
    return "\n".join(lines)


def merged_card(
    base_id: str, difference: float, tokens: int, dtype: str, ssm_lora: bool, file_format: str
) -> str:
    """Model card of merged weights."""
    name = one_line(base_id)
    library, loads = FORMATS[file_format]
    return MERGED.format(
        library=library,
        loads=loads,
        base=base_line(name),
        name=name,
        dtype=dtype,
        tokens=tokens,
        difference=difference,
        note=MERGED_NOTE if ssm_lora else "",
    )


def base_line(name: str) -> str:
    """`base_model: ...` for the card's header, if the base is a hub id; hubs refuse paths."""
    return f"base_model: {name}\n" if is_hub_id(name) else ""


def is_hub_id(name: str) -> bool:
    """Whether a base is named by its owner and its name on a hub, not by a directory."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
