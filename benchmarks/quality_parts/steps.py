"""Part b: how many steps PiSSA, LoRA+ and LoRA-GA need to the loss that LoRA has after 500. Loss is
held-out: all methods are measured on the same examples, and none gains by heart.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any

from quality_parts.jobs import Found, Job, Options, Results, finite, spread, sweep, table
from quality_parts.runs import LORA_TARGETS, fine_tune, train_base
from ssm_train.data.tasks.quickstart import BASE_SIZES, FIELDS, NEW_WORDING
from ssm_train.durable import write_atomically

TITLE = "b. Steps to a loss on a new task"
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "full": {},  # all weights: how much of the steps is the task's and not LoRA's
    "PiSSA": {"init_lora_weights": "pissa"},
    "LoRA+": {"loraplus_lr_ratio": 16},
    "LoRA-GA": {
        "init_lora_weights": "lora_ga",
        "loraga_batch_size": 8,
        "loraga_steps": 8,
    },
}
GOALS = {"PiSSA": 0.7, "LoRA+": 0.6, "LoRA-GA": 0.5}
RATES = (2e-3, 4e-3, 8e-3)
RATES_OF = {
    "full": (5e-4, 1e-3, 2e-3),
    "LoRA+": (2.5e-4, 5e-4, 1e-3),  # of A; B has 16 times as much
}
SWEEP_SEED = 100  # with a base of its own, and in no median
WINDOW = 5  # evaluations whose median counts
NEW_MODELS: dict[str, dict[str, Any]] = {
    "gla": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "intermediate_size": 320,
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
    },
    "mamba": {
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "state_size": 16,
        "time_step_rank": 8,
        "tie_word_embeddings": False,
    },
}
"""As in cfg/quickstart."""


def base_job(family: str, seed: int, options: Options) -> Job:
    steps = 20 if options.quick else 384
    return {"part": "b", "kind": "base", "family": family, "seed": seed, "steps": steps}


def tuning_job(family: str, method: str, rate: float, seed: int, options: Options) -> Job:
    steps, every = (20, 5) if options.quick else (500, 10)
    return {
        "part": "b", "kind": "tuning", "family": family, "method": method, "rate": rate,
        "seed": seed, "steps": steps, "every": every, "batch_size": 8,
    }  # fmt: skip


def seeds_of(options: Options) -> list[int]:
    return list(range(options.seeds))


def next_jobs(done: Results, options: Options) -> list[Job]:
    jobs = []
    for family in options.families:
        bases = [base_job(family, seed, options) for seed in (SWEEP_SEED, *seeds_of(options))]
        if any(job not in done for job in bases):
            jobs += bases
            continue
        for method in METHODS:
            missing, rate = best_rate(family, method, done, options)
            if rate is not None:
                missing = [
                    tuning_job(family, method, rate, seed, options) for seed in seeds_of(options)
                ]
            jobs += missing
    return jobs


def best_rate(
    family: str, method: str, done: Results, options: Options
) -> tuple[list[Job], float | None]:
    """On the sweep's seed: for LoRA the rate with the least loss in the end, for the others that
    with the fewest steps to LoRA's loss."""
    target = 0.0
    if method != "LoRA":
        missing, rate = best_rate(family, "LoRA", done, options)
        if rate is None:
            return missing, None
        target = last_loss(done[tuning_job(family, "LoRA", rate, SWEEP_SEED, options)])

    def cost(found: Found) -> tuple[float, float]:
        return finite(steps_to(target, found)), last_loss(found)

    rates = RATES_OF.get(method, RATES)
    return sweep(
        done,
        lambda rate: tuning_job(family, method, rate, SWEEP_SEED, options),
        rates[:1] if options.quick else rates,
        cost,
    )


def smooth(found: Found) -> list[tuple[int, float]]:
    """(step, median of the last evaluations up to it): one evaluation alone goes up and down."""
    losses = [(step, finite(loss)) for step, loss in found["losses"]]
    return [
        (step, median(loss for _, loss in losses[max(0, i - WINDOW + 1) : i + 1]))
        for i, (step, _) in enumerate(losses)
    ]


def last_loss(found: Found) -> float:
    return smooth(found)[-1][1] if found["outcome"] == "finished" else finite(None)


def steps_to(target: float, found: Found) -> int | None:
    """The first step at which the smoothed loss is not above the target."""
    return next((step for step, loss in smooth(found) if loss <= target), None)


# ---------------------------------------------------------------- one job


def run(job: Job, options: Options) -> Found:
    family, seed = job["family"], job["seed"]
    if job["kind"] == "base":
        return train_base(
            job, options,
            new_model={"model_type": family, **NEW_MODELS[family]}, tokenizer={"type": "word"},
            data=f"quickstart_base_{min(64 * job['steps'], BASE_SIZES['train'])}",
            group_by_length=False, max_eval_examples=128, batch_size=64, max_steps=job["steps"],
            learning_rate=2e-3, lr_scheduler_type="cosine", warmup_ratio=0.05,
            eval_steps=job["steps"],
        )  # fmt: skip
    lora = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": LORA_TARGETS[family]}
    trained = fine_tune(
        base_job(family, seed, options), job, options,
        data=str(write_cipher(options.work, seed)),
        task={"type": "generation", "prompt": "{record} =>", "label": " {sentence}"},
        peft=None if job["method"] == "full" else lora | METHODS[job["method"]],
        batch_size=job["batch_size"], max_steps=job["steps"],
        learning_rate=job["rate"], lr_scheduler_type="constant_with_warmup", warmup_steps=10,
        eval_steps=job["every"], logging_steps=job["every"], eval_at_start=True,
        group_by_length=False, eval_batch_size=128,
    )  # fmt: skip
    return {**trained.costs(), "losses": trained.curve("val", "loss")}


def write_cipher(work: Path, seed: int) -> Path:
    """The new task: the quickstart's records, said in a wording that the base never saw, each name
    by another one of its field. Which one is fixed, and depends on the ship's kind: there are two
    such ciphers. So there is something to learn for 500 steps, and no record twice."""
    directory = work / f"cipher-{seed}"
    if directory.exists():
        return directory
    draw = random.Random(f"cipher {seed}")
    ciphers = [{name: _derange(values, draw) for name, values in FIELDS.items()} for _ in "ab"]
    made = Path(mkdtemp(dir=work))
    for split, size in (("train", 4096), ("val", 64)):
        lines = []
        for _ in range(size):
            record = {name: draw.choice(values) for name, values in FIELDS.items()}
            cipher = ciphers[FIELDS["kind"].index(record["kind"]) % 2]
            facts = [f"{name} : {value}" for name, value in record.items()]
            draw.shuffle(facts)
            sentence = NEW_WORDING.format(**{name: cipher[name][v] for name, v in record.items()})
            lines.append(json.dumps({"record": " | ".join(facts), "sentence": sentence}) + "\n")
        write_atomically(made / f"{split}.jsonl", "".join(lines))
    try:
        made.rename(directory)
    except OSError:  # another process was first
        shutil.rmtree(made)
    return directory


def _derange(values: tuple[str, ...], draw: random.Random) -> dict[str, str]:
    """Value -> another value."""
    shuffled = draw.sample(values, len(values))
    return dict(zip(shuffled, shuffled[1:] + shuffled[:1], strict=True))


# ---------------------------------------------------------------- what it says


def ratios(family: str, method: str, done: Results, options: Options) -> list[float | None]:
    """Per seed that is done: steps to LoRA's last loss, over LoRA's steps."""
    rates = [best_rate(family, name, done, options)[1] for name in ("LoRA", method)]
    found = []
    for seed in seeds_of(options):
        jobs = [
            tuning_job(family, name, rate, seed, options)
            for name, rate in zip(("LoRA", method), rates, strict=True)
            if rate is not None
        ]
        if len(jobs) == 2 and all(job in done for job in jobs):
            lora, other = (done[job] for job in jobs)
            steps = steps_to(last_loss(lora), other)
            found.append(None if steps is None else steps / jobs[0]["steps"])
    return found


def describe(done: Results, options: Options) -> str:
    rows = []
    for family in options.families:
        for method in METHODS:
            _, rate = best_rate(family, method, done, options)
            values = ratios(family, method, done, options)
            if rate is None or not values:
                continue
            losses = [
                last_loss(done[job])
                for seed in seeds_of(options)
                if (job := tuning_job(family, method, rate, seed, options)) in done
            ]
            reached = [finite(value) for value in values]
            goal = GOALS.get(method)
            met = "" if goal is None else "yes" if median(reached) <= goal else "no"
            rows.append(
                [family, method, f"{rate:g}", spread(losses), spread(reached), goal or "", met]
            )
    header = ["base", "method", "learning rate", "loss at the end"]
    return table([*header, "steps / LoRA's steps", "goal", "met"], rows)


def draw(axes: Any, done: Results, options: Options) -> None:
    axes.set_yscale("log")
    for row, family in enumerate(options.families):
        for column, method in enumerate(METHODS):
            _, rate = best_rate(family, method, done, options)
            if rate is None:
                continue
            for seed in seeds_of(options):
                job = tuning_job(family, method, rate, seed, options)
                if job in done:
                    label = f"{family} {method}" if seed == 0 else None
                    steps, losses = zip(*smooth(done[job]), strict=True)
                    style = ("-", "--")[row % 2]
                    axes.plot(steps, losses, style, color=f"C{column}", lw=1, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title(TITLE)
