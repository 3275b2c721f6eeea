"""Composition root: config -> model -> data -> PEFT -> loop -> what a person takes away.

`python -m ssm_train.train --cfg ...` is what torchrun and `accelerate launch` start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path

from ssm_train import distributed
from ssm_train.assemble import (
    Subject,
    check_same_run,
    choose_main_metric,
    debug_config,
    debug_peft,
    describe_measures,
    describe_untested,
    find_splits,
    keep_new_base,
)
from ssm_train.bases import base_run, find_base, load_base_config, own_when_free, record_base
from ssm_train.config import RunConfig, describe_overrides, dump_yaml, run_directory
from ssm_train.data.fingerprint import fingerprint
from ssm_train.data.sources import check_data
from ssm_train.durable import replace_directory, writing
from ssm_train.ending import hear_others
from ssm_train.errors import InputError
from ssm_train.fit import fit, warm_up
from ssm_train.lock import check_free, own
from ssm_train.peft.coverage import measure_coverage
from ssm_train.peft.spec import PeftSpec, load_peft
from ssm_train.ready import Ready, get_ready
from ssm_train.record import (
    MARKER,
    check_peft,
    check_run_directory,
    check_same_data,
    create_run_directory,
    record_peft,
)
from ssm_train.record.environment import (
    Resumption,
    describe_resumptions,
    differing_facts,
    read_environment,
)
from ssm_train.record.revisions import hub_commits
from ssm_train.record.summary import Result
from ssm_train.trackers import check_trackers


def run(
    cfg: RunConfig,
    provenance: Mapping[str, str],
    cfg_path: str | Path,
    *,
    run_dir: Path | None = None,
    given: Subject | None = None,
    repeats: Path | None = None,
) -> Result:
    """Trains one config, from its files to an exported adapter or model. All ranks.

    `run_dir`: instead of the config's; `given`: a model that the caller made; `repeats`: a run
    whose record this one is compared with before it starts. Raises InputError for what the user
    can mend. Until the model is built and proven alive, nothing is written.
    """
    if cfg.debug:
        cfg = debug_config(cfg)
    run_dir = run_dir or run_directory(cfg, cfg_path)
    main = os.environ.get("RANK", "0") == "0"  # asked before the processes know each other
    if main and not cfg.lock:
        check_free(run_dir)
    with writing(run_dir), own(run_dir) if cfg.lock and main else nullcontext():
        return run_in(run_dir, cfg, provenance, given, repeats)


def run_in(
    run_dir: Path,
    cfg: RunConfig,
    provenance: Mapping[str, str],
    given: Subject | None = None,
    repeats: Path | None = None,
) -> Result:
    """`run`, once the directory is ours."""
    first = cfg.resume and not (run_dir / MARKER).exists()  # the same command the first time
    cfg = cfg.model_copy(update={"resume": cfg.resume and not first})
    check_run_directory(run_dir, overwrite=cfg.overwrite, resume=cfg.resume)
    check_trackers(cfg.trackers)
    splits = find_splits(cfg)
    cfg, changes = check_same_run(cfg, run_dir) if cfg.resume else (cfg, [])
    changes += ["--resume: no run is there yet, so this one begins"] if first else []
    task = check_data(cfg, splits)
    main_metric = choose_main_metric(cfg, task)
    peft = load_peft(cfg.peft, cfg.peft_overrides.given(), provenance)
    if cfg.debug and peft:
        peft = debug_peft(peft)
    if cfg.resume and peft:
        check_peft(run_dir, peft.dump())
    if (unfinished := train_base(cfg)) is not None:
        return unfinished
    ready = get_ready(run_dir, cfg, splits, peft, given)
    with ExitStack() as held:
        claim_directory(ready, peft, changes, held)
        held.enter_context(ready.stop)
        held.enter_context(hear_others())
        lines = [*describe_start(ready, provenance), describe_measures(cfg, task, main_metric)]
        lines += [*describe_untested(cfg, splits), *changes, *ready.notes]
        if repeats is not None:
            record = read_environment(repeats)
            lines += [f"{repeats} was {line}" for line in describe_resumptions(record)]
            differing = differing_facts(record, read_environment(run_dir))
            lines += [f"unlike {repeats}: {line}" for line in differing]
        result = None
        if ready.warms_up:
            result = warm_up(ready, main_metric, lines)
            lines = [*ready.notes, str(measure_coverage(ready.subject.prepared.model))]
        result = result or fit(ready, main_metric, lines)
    distributed.barrier()
    return result


def claim_directory(
    ready: Ready, peft: PeftSpec | None, changes: list[str], held: ExitStack
) -> None:
    """All ranks. Rank 0 makes the run directory and owns it as long as `held`; what can be mended
    was found before. `changes`: in words, of a resumed run's config."""

    def claim() -> None:
        held.enter_context(own(ready.run_dir, insist=False))
        write_record(ready, peft, changes)

    distributed.work_together(claim if distributed.is_main() else None)


def write_record(ready: Ready, peft: PeftSpec | None, changes: list[str]) -> None:
    """Rank 0."""
    run_dir, cfg = ready.run_dir, ready.cfg
    resumed = Resumption(ready.found.step if ready.found else 0, changes) if cfg.resume else None
    data = fingerprint(ready.data["train"])
    if cfg.resume:
        check_same_data(run_dir, data)
    create_run_directory(
        run_dir, dump_yaml(cfg), overwrite=cfg.overwrite, new=not (cfg.resume or cfg.overwrite),
        resumed=resumed, engine=ready.engine.name, processes=distributed.world_size(),
        device=str(ready.engine.device), data=data,
        hub_commits=hub_commits(
            cfg, ready.data, ready.base, cfg.revision,
            ready.subject.prepared.tokenizer.name_or_path,
        ),
    )  # fmt: skip
    if peft:
        record_peft(run_dir, peft.dump())
    if cfg.model is not None:
        record_base(run_dir, str(ready.base))
    if isinstance(cfg.tokenizer, dict):  # built from the training data
        with replace_directory(run_dir / "tokenizer") as directory:
            ready.subject.prepared.tokenizer.save_pretrained(directory)
    if ready.subject.method and ready.base is None:
        ready.base = str(keep_new_base(cfg, run_dir))


def train_base(cfg: RunConfig) -> Result | None:
    """Where `model` is a run config, trains it, unless that was done before. All ranks.

    Returns how it ended where that is too early; a stopped one goes on the next time. Raises
    InputError where another base is there.
    """
    run_dir = base_run(cfg)
    if run_dir is None:
        return None
    assert cfg.model is not None
    base_cfg, provenance = load_base_config(cfg.model)
    if base_cfg.peft is not None:
        raise InputError(f"model: {cfg.model} trains an adapter; a base needs peft: null")
    if provenance["device"] == "default":
        base_cfg = base_cfg.model_copy(update={"device": cfg.device})
    if base_cfg.debug:  # as its record says
        base_cfg = debug_config(base_cfg)
    if distributed.launched_processes() > 1:  # so that all ranks wait for rank 0
        distributed.build_accelerator(cfg.prec, cfg.device)
    if find_base(run_dir, base_cfg, cfg.model) == "done":
        return None
    with own_when_free(run_dir):
        found = find_base(run_dir, base_cfg, cfg.model)  # another process may have made it
        if found == "done":
            return None
        launch = {"resume": found == "begun", "overwrite": found == "none", "lock": False}
        result = run(base_cfg.model_copy(update=launch), provenance, cfg.model)
    return None if result.outcome == "finished" else result


def describe_start(ready: Ready, provenance: Mapping[str, str]) -> list[str]:
    """What a run says first: values that are no defaults, processes, model, kernels, PEFT, data,
    steps."""
    prepared, schedule, data = ready.subject.prepared, ready.schedule, ready.data
    world, device = distributed.world_size(), ready.engine.device
    processes = f"{world} processes on {device.type}" if world > 1 else f"1 process on {device}"
    if (name := ready.engine.name) not in processes:
        processes += f" under {name}"
    counts = ", ".join(f"{len(dataset):,} {split}" for split, dataset in data.items())
    dropped = data["train"].dropped
    too_long = f" ({dropped:,} longer than max_length dropped)" if dropped else ""
    return [
        f"run {ready.run_dir}",
        *(f"  {line}" for line in describe_overrides(ready.cfg, provenance)),
        processes,
        f"model {ready.subject.reason}",
        f"kernels {', '.join(f'{op}: {name}' for op, name in prepared.kernels.items())}",
        str(measure_coverage(prepared.model)) if ready.subject.method else "full fine-tuning",
        f"data {counts} examples{too_long}; {schedule.total_steps:,} steps, "
        f"{schedule.steps_per_epoch:,} an epoch",
        *(line for dataset in data.values() for line in dataset.describe_blank()),
    ]


if __name__ == "__main__":
    from ssm_train.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
