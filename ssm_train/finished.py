"""A run loaded again: to evaluate it, to generate with it, to merge its adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssm_train import distributed, snapshot
from ssm_train.adapters.base import ModelAdapter, Prepared
from ssm_train.assemble import base_id, build_evaluation, load_examples, prepare_model
from ssm_train.bases import check_base, recorded_base
from ssm_train.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, read_pointer
from ssm_train.config import RunConfig, load_config
from ssm_train.data.sources import resolve_source, why_no_test
from ssm_train.errors import InputError, whole_number
from ssm_train.generate import generate_text
from ssm_train.peft.sd_lora import SdLoraMethod
from ssm_train.peft.spec import load_peft
from ssm_train.record import MARKER, WARMUP, recorded_peft

if TYPE_CHECKING:
    from ssm_train.peft.merge import FileFormat


def load_run(run_dir: str | Path, checkpoint: str = "best", device: str = "auto") -> Any:
    """(model, tokenizer) of a run, in evaluation mode.

    `checkpoint`: "best" (the exported weights), "last", or a step. Raises InputError.
    """
    _, _, prepared, _ = open_run(Path(run_dir), checkpoint, device)
    return prepared.model.eval(), prepared.tokenizer


def open_run(
    run_dir: Path, checkpoint: str, device: str, **changes: Any
) -> tuple[RunConfig, ModelAdapter, Prepared, str | None]:
    """Config with `changes`, adapter, model and the base's id. Nothing is written."""
    begun = list_checkpoints(run_dir) or (run_dir / "adapter").is_dir()
    if (run_dir / WARMUP).is_dir() and not begun:
        raise InputError(
            f"{run_dir} stopped in its warm-up, after which its training begins; go on with "
            "--resume"
        )
    cfg = recorded_config(run_dir).model_copy(update={"device": device, **changes})
    accelerator = distributed.build_accelerator(cfg.prec, cfg.device)
    place = str(accelerator.device)
    if cfg.peft is None and checkpoint == "best":
        exported = exported_weights(run_dir, "model")
        cfg = cfg.model_copy(update={"new_model": None, "tokenizer": None})
        subject = prepare_model(cfg, str(exported), place, frozen=True)
        return cfg, subject.adapter, subject.prepared, None
    if isinstance(cfg.tokenizer, dict):  # was built from the training data
        cfg = cfg.model_copy(update={"tokenizer": str(run_dir / "tokenizer")})
    base = base_id(cfg, run_dir)
    if cfg.model is not None:
        check_base(run_dir, str(base))
    subject = prepare_model(cfg, base, place, frozen=cfg.peft is not None)
    adapter, prepared = subject.adapter, subject.prepared
    if checkpoint == "best":
        from ssm_train.peft.export import load_adapter

        prepared.model = load_adapter(prepared.model, exported_weights(run_dir, "adapter"))
        return cfg, adapter, prepared, base
    peft = load_peft(recorded_peft(run_dir) or cfg.peft, cfg.peft_overrides.given())
    method = peft.make() if peft else None
    found = load_checkpoint(find_checkpoint(run_dir, checkpoint))
    if isinstance(method, SdLoraMethod):
        method.begin_training(prepared)
    elif method:
        method.inject(prepared)
    snapshot.load_parameters(prepared.model, found.tensors["trainable"])
    if method and "base" in found.tensors:
        method.restore_base(prepared.model, found.tensors["base"])
    return cfg, adapter, prepared, base


def recorded_config(run_dir: Path) -> RunConfig:
    base = recorded_base(run_dir)
    return load_config(run_dir / MARKER, {"model": json.dumps(base)} if base else None)[0]


def exported_weights(run_dir: Path, kind: str) -> Path:
    if not (run_dir / kind).is_dir():
        raise InputError(
            f"{run_dir} has no {kind}/ yet: the run has not finished; give --checkpoint last, "
            "or finish it with --resume"
        )
    return run_dir / kind


def find_checkpoint(run_dir: Path, checkpoint: str) -> Path:
    """The directory of "last" or of a step. Raises InputError naming those that exist."""
    steps = [step for step, _ in list_checkpoints(run_dir)]
    step = read_pointer(run_dir, "last") if checkpoint == "last" else whole_number(checkpoint)
    if step not in steps:
        have = ", ".join(map(str, sorted(steps))) or "none"
        raise InputError(f"--checkpoint {checkpoint}: {run_dir} has checkpoints of steps: {have}")
    return checkpoint_path(run_dir, step)


def evaluate_run(
    run_dir: Path, *, data: str | None, split: str | None, checkpoint: str, device: str
) -> dict[str, float]:
    """Loss and metrics of a run on its own data or other; every example counts, none is
    too long; blank texts are left out, and said on stderr."""
    changes: dict[str, Any] = {}
    began = recorded_config(run_dir)
    if split == "test" and data is None and (reason := why_no_test(began)):
        raise InputError(f"--split test: {reason}, or give --data")
    if data is not None or split not in (None, "val", "test"):
        # Another split is one of the training data.
        name, key = (began.data, "data") if data is None else (data, "--data")
        changes = {"val_data": name, "val_data_split": split or "val"}
        resolve_source(name, split or "val", key, began.data_root)  # before the model is loaded
    cfg, adapter, prepared, _ = open_run(run_dir, checkpoint, device, **changes)
    dataset = load_examples(
        cfg, prepared.tokenizer, "test" if split == "test" and not data else "val"
    )
    for line in dataset.describe_blank():
        sys.stderr.write(f"{line}\n")
    place = next(prepared.model.parameters()).device
    autocast = partial(distributed.autocast, cfg.prec, place)
    values, _ = build_evaluation(cfg, adapter, dataset, prepared, autocast).run(prepared.model)
    return values


def generate_from(
    run_dir: Path,
    prompts: Sequence[str],
    *,
    checkpoint: str,
    device: str,
    max_new_tokens: int,
    num_beams: int,
) -> list[str]:
    """One answer a prompt."""
    cfg, _, prepared, _ = open_run(run_dir, checkpoint, device)
    place = next(prepared.model.parameters()).device
    return generate_text(
        prepared.model,
        prepared.tokenizer,
        prompts,
        autocast=partial(distributed.autocast, cfg.prec, place),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
    )


def merge_run(
    run_dir: Path,
    out: Path,
    *,
    checkpoint: str,
    device: str,
    file_format: FileFormat,
    tolerance: float,
) -> float:
    """Writes base plus adapter as full weights that any transformers install loads, or mamba_ssm;
    returns how far its logits are from base plus adapter, relative to their size."""
    from ssm_train.peft.merge import check_format, merge_adapter, write_merged

    cfg, _, prepared, base = open_run(run_dir, checkpoint, device)
    if cfg.peft is None:
        raise InputError(f"{run_dir} is full fine-tuning; its full weights are in {run_dir}/model")
    check_format(prepared.model.config, file_format)
    merged = merge_adapter(prepared.model, prepared.traits, tolerance=tolerance)
    write_merged(
        merged, out, base_id=base or "", tokenizer=prepared.tokenizer, file_format=file_format
    )
    return merged.difference
