"""Which engine a launcher asked for, through Accelerate's environment variables, and that it runs.

`accelerate launch` sets them from its YAML; torchrun and srun work with them too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssm_train import distributed
from ssm_train.engines.base import Engine as Engine
from ssm_train.engines.launcher import Statement, read_parent
from ssm_train.engines.zero_config import Numbers, read_config
from ssm_train.errors import InputError

Kind = Literal["replicated", "zero", "fsdp"]


@dataclass(frozen=True)
class Asked:
    """What the launcher asked for."""

    kind: Kind = "replicated"
    ds_config: Path | None = None


def read_environment() -> Asked:
    """Raises InputError for what cannot be, with the way out."""
    zero, fsdp = (is_true(f"ACCELERATE_USE_{name}") for name in ("DEEPSPEED", "FSDP"))
    if is_true("ACCELERATE_USE_MEGATRON_LM"):
        raise InputError("Accelerate is set to Megatron-LM, which is not supported")
    if zero and fsdp:
        raise InputError("Accelerate is set to DeepSpeed and to FSDP at once; unset one of them")
    if fsdp:
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise InputError(
                f"Accelerate is set to FSDP version {version}, but only 2 is supported; "
                "set fsdp_version: 2 in its config"
            )
        return Asked("fsdp")
    if not zero:
        return Asked()
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not path or path == "none":
        raise InputError(
            "Accelerate is set to DeepSpeed without a config file; set deepspeed_config_file in "
            "its config, for instance to ds_configs/zero2.json"
        )
    return Asked("zero", Path(path))


def build_engine(accelerator: Any, numbers: Numbers) -> Engine:
    """All ranks. The engine that was asked for, on the Accelerator's processes and device. Raises
    InputError where it cannot run, or where the configs contradict each other."""
    asked = read_environment()
    check_launch(read_parent(), asked, numbers.prec)
    if asked.kind == "replicated":
        from ssm_train.engines.replicated import Replicated

        return Replicated(accelerator, numbers.trains_all)
    name = "ZeRO" if asked.kind == "zero" else "FSDP2"
    if numbers.prec == "fp16":
        raise InputError(
            f"prec: fp16 scales the loss, which is not done under {name}; use prec: bf16"
        )
    distributed.group_alone(accelerator.device)
    if asked.kind == "fsdp":
        from ssm_train.engines.fsdp import Fsdp

        return Fsdp(accelerator.device)
    from ssm_train.engines.zero import Zero

    assert asked.ds_config is not None
    return Zero(accelerator.device, read_config(asked.ds_config, numbers), numbers.prec)


def check_launch(said: Statement, asked: Asked, prec: str) -> None:
    """Raises InputError where `accelerate launch` was asked for what does not run."""
    launched = distributed.launched_processes()
    if said.num_processes is not None and said.num_processes != launched:
        raise InputError(
            f"{said.source} asks for {said.num_processes} processes, but {launched} "
            f"{'runs' if launched == 1 else 'run'}: on a CPU accelerate launch starts one; start "
            f"with ACCELERATE_USE_CPU=true torchrun --nproc_per_node {said.num_processes} "
            "-m ssm_train.train, or set num_processes to what there is"
        )
    kinds: dict[str | None, Kind] = {"DEEPSPEED": "zero", "FSDP": "fsdp"}
    if (wanted := kinds.get(said.distributed_type)) is not None and wanted != asked.kind:
        raise InputError(
            f"{said.source} asks for {said.distributed_type}, but its variables did not arrive "
            "here, so that this would be plain DDP; remove --cpu, or what unsets "
            f"ACCELERATE_USE_{said.distributed_type}"
        )
    stated = {"no": "fp32"}.get(said.mixed_precision or "", said.mixed_precision)
    if stated is not None and stated != prec:
        raise InputError(
            f"mixed_precision of {said.source} is {said.mixed_precision!r}, but prec of the run "
            f"is {prec!r}; set one as the other (no is fp32)"
        )


def is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "y", "on")
