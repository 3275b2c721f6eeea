"""The table of methods: a line for each, with the families on which it works. On all others it is
refused, with one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_tiny import RANKS

FAMILIES = {
    "gla": ("fp32", "bf16"),
    "mamba": ("fp32", "bf16"),
    "mamba2": ("fp32", "bf16"),
    "bamba": ("fp32",),  # a hybrid of what is tested in both above
}
"""Family -> precisions."""

ALL = tuple(FAMILIES)
SSM = ("mamba", "mamba2", "bamba")

Json = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One row of the page."""

    title: str
    settings: Json | None
    """The PEFT JSON; None: full fine-tuning."""
    families: tuple[str, ...] = ALL
    """Where it works."""
    of_family: Mapping[str, Json] = field(default_factory=dict)
    """Settings that differ, because names of layers do."""
    unchanged: bool = True
    """Whether step 0 has the base model's function."""
    merges: bool = True
    """Whether weights can hold it."""

    def settings_of(self, family: str) -> Json | None:
        if self.settings is None:
            return None
        return self.settings | self.of_family.get(family, {})


def lora(title: str, families: tuple[str, ...] = ALL, **settings: Any) -> Method:
    """LoRA of rank 4; where a matrix of the tiny Mamba is smaller, of its rank."""
    ranks = {"dt_proj": 1} if settings.get("init_lora_weights") == "lora_ga" else RANKS
    return Method(
        title,
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings,
        families,
        of_family={} if "target_modules" in settings else {"mamba": {"rank_pattern": ranks}},
    )


SLICES = ["in_proj_x", "in_proj_z", "x_proj_dt", "x_proj_B", "x_proj_C"]
SLICES2 = ["in_proj_z", "in_proj_x", "in_proj_B", "in_proj_C", "in_proj_dt"]
FREEZE = {"peft_type": "LAYER_FREEZE"}
STATE = {"peft_type": "SSMPEFT", "scan": {"type": "init_state"}}
OFFSET = {"peft_type": "STATE_OFFSET_TUNING"}
TRANSFORM = {"peft_type": "PARAM_TRANSFORM"}
SD = {"peft_type": "SD_LORA", "num_freeze": {"channel": 0.5, "state": 0.5}, "proj_lora_r": 2}

METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", None),
    "lora": lora("LoRA"),
    "lora_gaussian": lora("LoRA, gaussian", init_lora_weights="gaussian"),
    "lora_orthogonal": lora("LoRA, orthogonal", init_lora_weights="orthogonal"),
    "lora_plus": lora("LoRA+", loraplus_lr_ratio=16),
    "rslora": lora("rsLoRA", use_rslora=True),
    "dora": lora("DoRA", use_dora=True),
    "pissa": lora("PiSSA", init_lora_weights="pissa"),
    "pissa_niter": lora("PiSSA, fast SVD", init_lora_weights="pissa_niter_4"),
    "olora": lora("OLoRA", init_lora_weights="olora"),
    "lora_ga": lora("LoRA-GA", init_lora_weights="lora_ga"),
    "lora_slices": Method(
        "LoRA on slices",
        {"peft_type": "LORA", "r": 2, "target_modules": SLICES},
        SSM,
        of_family=dict.fromkeys(("mamba2", "bamba"), {"target_modules": SLICES2}),
    ),
    "bitfit": Method("BitFit", {"peft_type": "BITFIT"}),
    "bitfit_new": Method(
        "BitFit, new biases",
        {"peft_type": "BITFIT", "target_modules": ["in_proj", "conv1d"]},
        of_family={
            "gla": {"target_modules": ["q_proj", "o_proj"]},
            "bamba": {"target_modules": ["in_proj", "o_proj", "conv1d"]},
        },
    ),
    "freeze_ssm": Method(
        "layer freeze: A, D, convolution",
        FREEZE | {"trainable_layers": ["A_log", "D", "conv1d"]},
        SSM,
    ),
    "freeze_gates": Method(
        "layer freeze: gates", FREEZE | {"trainable_layers": ["gk_proj", "mlp_norm"]}, ("gla",)
    ),
    "freeze_layer": Method(
        "layer freeze: one layer",
        FREEZE | {"trainable_layers": ["layers.1"]},
    ),
    "state": Method("initial state", STATE, SSM, merges=False),
    "state_rank": Method(
        "initial state of a rank",
        {"peft_type": "SSMPEFT", "scan": {"type": "init_state", "hidden_dim": 3}},
        SSM,
        merges=False,
    ),
    "state_and_window": Method(
        "initial state and convolution", STATE | {"conv_init_state": True}, SSM, merges=False
    ),
    "offset": Method("state offset", OFFSET, ("mamba",), merges=False),
    "offset_rank": Method("state offset of a rank", OFFSET | {"r": 3}, ("mamba",), merges=False),
    "output": Method(
        "output offset", OFFSET | {"tuning_mode": "OUTPUT_TUNING"}, ("mamba",), merges=False
    ),
    "transform_states": Method(
        "scaled B and C",
        TRANSFORM | {"parameters": ["B", "C"], "scale_shape": "n"},
        ("mamba",),
    ),
    "transform_channels": Method(
        "scaled and shifted B and C, by channel",
        TRANSFORM | {"scale_shape": "d", "bias_shape": "n"},
        ("mamba",),
        merges=False,
    ),
    "transform_rank": Method(
        "scaled and shifted B and C, of a rank",
        TRANSFORM | {"scale_shape": "dn", "bias_shape": "dn", "r": 2},
        ("mamba",),
        merges=False,
    ),
    "more_states": Method(
        "additional scan", {"peft_type": "ADDITIONAL_SCAN", "num_states": 3}, ("mamba",)
    ),
    "affix": Method(
        "affix",
        {"peft_type": "AFFIX_TUNING", "num_virtual_tokens": 2},
        SSM,
        unchanged=False,
        merges=False,
    ),
    "sd_lora": Method("SDT + LoRA", SD, SSM),
    "sd_lora_zero": Method(
        "SDT + LoRA, with zeroed channels",
        SD
        | {
            "num_freeze": {"channel": 0.5, "state": 5},
            "num_zero": {"channel": 7},
            "finetune_parameters": ["D", "dt_proj.bias"],
            "sdlora_alpha": {"global": 0.5, "A_log": 3.0},
        },
        ("mamba",),
        unchanged=False,
    ),
    "gla_sd_lora": Method(
        "SDT + LoRA for GLA",
        {"peft_type": "GLA_SD_LORA", "proj_lora_r": 2},
        ("gla",),
        unchanged=False,
        merges=False,
    ),
}
CELLS = [
    (name, family, prec)
    for family, precisions in FAMILIES.items()
    for name, method in METHODS.items()
    for prec in precisions
    if family in method.families
]
REFUSED = [
    (name, family)
    for family in FAMILIES
    for name in METHODS
    if family not in METHODS[name].families
]

OWN = {
    name: method
    for name, method in METHODS.items()
    if method.settings and method.settings["peft_type"] != "LORA"
}
