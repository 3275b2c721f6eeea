"""Part c: the gradient norm of LoRA's factors falls with the rank, that of rsLoRA does not."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Any

from quality_parts.jobs import Found, Job, Options, Results, finite, spread, table
from quality_parts.runs import fine_tune, train_base

TITLE = "c. Gradient norm by rank"
METHODS = {"LoRA": False, "rsLoRA": True}
TARGETS = {"gla": ["q_proj", "v_proj", "o_proj"], "mamba": ["in_proj", "out_proj"]}
"""Projections without a side smaller than the largest rank."""
LEARNT = {"type": "text", "field": "record"}
"""Lists of facts: of all ships for the base, of some for fine-tuning. So the loss begins not far
above one that no rank gets below, as when a language model is fine-tuned. Otherwise gradients are
the smaller the faster a rank learns."""
FLAT = 2.0  # largest over smallest norm up to which a line counts as flat


def family_of(options: Options) -> str:
    """One family answers the question: Mamba-1, unless only GLA is asked for."""
    return "mamba" if "mamba" in options.families else "gla"


def ranks_of(options: Options) -> tuple[int, ...]:
    return (4, 16) if options.quick else (4, 8, 16, 32, 64, 128, 256)


def base_job(seed: int, options: Options) -> Job:
    return {
        "part": "c", "kind": "base", "family": family_of(options), "seed": seed,
        "hidden_size": 32 if options.quick else 256, "steps": 4 if options.quick else 200,
    }  # fmt: skip


def tuning_job(method: str, rank: int, seed: int, options: Options) -> Job:
    return {
        "part": "c", "kind": "tuning", "family": family_of(options), "method": method,
        "rank": rank, "seed": seed, "hidden_size": base_job(seed, options)["hidden_size"],
        "steps": 4 if options.quick else 200, "rate": 5e-4,
    }  # fmt: skip


def next_jobs(done: Results, options: Options) -> list[Job]:
    seeds = range(options.seeds)
    bases = [base_job(seed, options) for seed in seeds]
    if any(job not in done for job in bases):
        return bases
    return [
        tuning_job(method, rank, seed, options)
        for seed in seeds
        for rank in ranks_of(options)
        for method in METHODS
    ]


def run(job: Job, options: Options) -> Found:
    """Tuning: alpha and learning rate are the same for every rank. `gradient_norm`: the norm of
    the loss's gradient by all A and B together, before clipping, mean over the steps."""
    if job["kind"] == "base":
        width = job["hidden_size"]
        sizes: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": width}
        if job["family"] == "gla":
            sizes |= {"num_heads": 2, "expand_k": 1.0, "intermediate_size": width}
        return train_base(
            job, options,
            new_model={"model_type": job["family"], "tie_word_embeddings": False, **sizes},
            tokenizer={"type": "word"}, task=LEARNT,
            data=f"quickstart_base_{16 * job['steps']}",
            group_by_length=False, batch_size=16, max_steps=job["steps"], learning_rate=2e-3,
            lr_scheduler_type="cosine", warmup_ratio=0.05, max_eval_examples=128,
            eval_steps=job["steps"],
        )  # fmt: skip
    trained = fine_tune(
        base_job(job["seed"], options), job, options,
        data="quickstart", task=LEARNT, batch_size=4, max_steps=job["steps"],
        logging_steps=1, skip_eval=True,
        peft={
            "peft_type": "LORA",
            "r": job["rank"],
            "lora_alpha": 16,
            "use_rslora": METHODS[job["method"]],
            "target_modules": TARGETS[job["family"]],
        },
        learning_rate=job["rate"], lr_scheduler_type="constant", group_by_length=False,
    )  # fmt: skip
    norms = [finite(norm) for _, norm in trained.curve("train", "grad_norm")]
    losses = [finite(loss) for _, loss in trained.curve("train", "loss")]
    return {
        **trained.costs(),
        "gradient_norm": fmean(norms),
        "gradient_norms": norms,
        "loss": fmean(losses[-20:]),
    }


def norms_of(method: str, rank: int, done: Results, options: Options) -> list[Found]:
    jobs = [tuning_job(method, rank, seed, options) for seed in range(options.seeds)]
    return [done[job] for job in jobs if job in done]


def slope(norms: list[tuple[int, float]]) -> float:
    """Of log(norm) over log(rank), by least squares: 0 is flat, -0.5 falls as 1 / sqrt(r)."""
    x = [math.log(rank) for rank, _ in norms]
    y = [math.log(norm) for _, norm in norms]
    dx = [value - fmean(x) for value in x]
    return sum(a * b for a, b in zip(dx, y, strict=True)) / sum(a * a for a in dx)


def describe(done: Results, options: Options) -> str:
    rows, verdicts = [], []
    for method in METHODS:
        medians = []
        for rank in ranks_of(options):
            if found := norms_of(method, rank, done, options):
                norms = [one["gradient_norm"] for one in found]
                first = [one["gradient_norms"][0] for one in found]
                losses = [one["loss"] for one in found]
                medians.append((rank, median(norms)))
                rows.append([method, rank, spread(norms), spread(first), spread(losses)])
        if len(medians) > 1:
            ratio = max(n for _, n in medians) / min(n for _, n in medians)
            verdicts.append([method, f"{slope(medians):.2f}", f"{ratio:.2f}", _verdict(ratio)])
    header = ["method", "rank", "gradient norm, mean of all steps", "in the first step"]
    summary = ["method", "slope in log r", "largest / smallest norm", f"flat (at most {FLAT:g})"]
    return "\n\n".join(
        [table([*header, "loss in the last 20 steps"], rows), table(summary, verdicts)]
    )


def _verdict(ratio: float) -> str:
    return "yes" if ratio <= FLAT else "no"


def draw(axes: Any, done: Results, options: Options) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for method in METHODS:
        points = [
            (rank, median(one["gradient_norm"] for one in found))
            for rank in ranks_of(options)
            if (found := norms_of(method, rank, done, options))
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=method)
    axes.set_xlabel("rank")
    axes.set_ylabel("gradient norm of A and B")
    axes.set_title(TITLE)
