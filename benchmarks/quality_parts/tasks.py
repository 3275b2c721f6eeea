"""Part d: every method on SST-2 and DART, from a small base that read the same training texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from quality_parts.jobs import Found, Job, Options, Results, finite, name_of, spread, sweep, table
from quality_parts.runs import LORA_TARGETS, fine_tune, train_base
from ssm_train.data import DataSettings
from ssm_train.data.sources import find_source
from ssm_train.data.tasks.text import linearise
from ssm_train.durable import write_atomically
from ssm_train.errors import InputError

TITLE = "d. SST-2 and DART"
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
METHODS: dict[str, dict[str, dict[str, Any] | None]] = {
    "none": {"gla": None, "mamba": None},
    "full": {"gla": None, "mamba": None},
    "LoRA": dict.fromkeys(("gla", "mamba"), LORA),
    "DoRA": dict.fromkeys(("gla", "mamba"), LORA | {"use_dora": True}),
    "PiSSA": dict.fromkeys(("gla", "mamba"), LORA | {"init_lora_weights": "pissa"}),
    "LoRA-GA": dict.fromkeys(
        ("gla", "mamba"),
        LORA | {"init_lora_weights": "lora_ga", "loraga_batch_size": 8, "loraga_steps": 8},
    ),
    "SDLoRA": {
        "gla": {"peft_type": "GLA_SD_LORA"},
        "mamba": {"peft_type": "SD_LORA", "num_freeze": {"channel": 0.9, "state": 0.75}},
    },
    "BitFit": {  # on projections that have no bias too, as GLA has next to none
        "gla": {"peft_type": "BITFIT", "target_modules": [*LORA_TARGETS["gla"], "gk_proj.1"]},
        "mamba": {
            "peft_type": "BITFIT",
            "target_modules": [*LORA_TARGETS["mamba"], "dt_proj", "conv1d"],
        },
    },
    "initial state": {
        "mamba": {
            "peft_type": "SSMPEFT",
            "scan": {"type": "init_state", "init": "zero"},
            "conv_init_state": True,
        }
    },
}
"""Method -> family -> its PEFT config; None trains all weights, "none" at a rate of 0. A family
that is missing has no place for the method."""
RATES = {"none": (0.0,), "full": (5e-4, 1e-3, 2e-3), "BitFit": (4e-3, 8e-3, 1.6e-2)}
RATES_OF_ADAPTERS = (2e-3, 4e-3, 8e-3)
NEW_MODELS: dict[str, dict[str, Any]] = {
    "gla": {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 320},
    "mamba": {"hidden_size": 160, "num_hidden_layers": 2, "time_step_rank": 10},
}
"""As in cfg/sst2 and cfg/dart."""


@dataclass(frozen=True)
class Task:
    metric: str
    tokenizer: dict[str, Any]
    text: tuple[str, str]  # of the base: template, and the field that is repeated or a list
    task: dict[str, Any]
    run: dict[str, Any]  # other settings of fine-tuning


TASKS = {
    "sst2": Task(
        metric="accuracy",
        tokenizer={"type": "word", "vocab_size": 5000},
        # A base that never writes the words 0 and 1 cannot learn to answer with them.
        text=("feeling : {label} \nreview : {sentence} \nfeeling : {label}", "sentence"),
        task={
            "type": "classification",
            "prompt": "review : {sentence} \nfeeling :",
            "label_field": "label",
            "labels": {0: "0", 1: "1"},
            "metrics": ["accuracy"],
        },
        run={},
    ),
    "dart": Task(
        metric="bleu",
        tokenizer={"type": "bpe", "vocab_size": 2048},
        text=("description : {annotations} \nfacts : {tripleset}", "annotations"),
        task={
            "type": "generation",
            "prompt": "facts : {tripleset} \ndescription :",
            "label": " {annotations}",
            "metrics": ["bleu"],
        },
        run={"max_length": 160, "eval_gen": {"max_new_tokens": 64}},
    ),
}


def base_job(family: str, task: str, options: Options) -> Job:
    steps = 4 if options.quick else 650
    return {"part": "d", "kind": "base", "family": family, "task": task, "seed": 0, "steps": steps}


def tuning_job(
    family: str, task: str, method: str, rate: float, seed: int, options: Options
) -> Job:
    steps = 1 if method == "none" else 4 if options.quick else 400
    return {
        "part": "d", "kind": "tuning", "family": family, "task": task, "method": method,
        "rate": rate, "seed": seed, "steps": steps,
        "examples": 8 if options.quick else 500,
    }  # fmt: skip


def seeds_of(options: Options) -> range:
    return range(min(3, options.seeds))


def next_jobs(done: Results, options: Options) -> list[Job]:
    if not options.data:
        raise InputError("part d needs --sst2 or --dart, a directory with the data set")
    jobs = []
    for family in options.families:
        for task in options.data:
            base = base_job(family, task, options)
            if base not in done:
                jobs.append(base)
                continue
            for method in methods_of(family):
                missing, rate = best_rate(family, task, method, done, options)
                if rate is not None:
                    missing = [
                        tuning_job(family, task, method, rate, seed, options)
                        for seed in seeds_of(options)
                    ]
                jobs += missing
    return jobs


def methods_of(family: str) -> list[str]:
    return [method for method, configs in METHODS.items() if family in configs]


def best_rate(
    family: str, task: str, method: str, done: Results, options: Options
) -> tuple[list[Job], float | None]:
    """With seed 0, by the metric on the validation split."""
    rates = RATES.get(method, RATES_OF_ADAPTERS)
    return sweep(
        done,
        lambda rate: tuning_job(family, task, method, rate, 0, options),
        rates[:1] if options.quick else rates,
        lambda found: -found["val"] if found["outcome"] == "finished" else finite(None),
    )


# ---------------------------------------------------------------- one job


def run(job: Job, options: Options) -> Found:
    family, task = job["family"], TASKS[job["task"]]
    if job["kind"] == "base":
        return train_base(
            job, options,
            new_model={"model_type": family, "tie_word_embeddings": True, **NEW_MODELS[family]},
            tokenizer=task.tokenizer, data=str(write_texts(job, options)), task={"type": "text"},
            batch_size=32, max_length=160, max_steps=job["steps"], eval_steps=job["steps"],
            learning_rate=2e-3, adam_beta2=0.95, weight_decay=0.1, lr_scheduler_type="cosine",
            warmup_ratio=0.1, eval_batch_size=128,
        )  # fmt: skip
    peft = METHODS[job["method"]][family]
    if peft is not None and peft["peft_type"] == "LORA":
        peft = peft | {"target_modules": LORA_TARGETS[family]}
    elif peft is not None and "SD_LORA" in peft["peft_type"]:
        peft = peft | {"num_warmup_it": max(1, job["steps"] // 8 - 1)}
    trained = fine_tune(
        base_job(family, job["task"], options), job, options,
        data=str(options.data[job["task"]]), task=task.task, peft=peft, batch_size=32,
        max_steps=job["steps"], eval_steps=job["steps"], max_eval_examples=job["examples"],
        learning_rate=job["rate"], lr_scheduler_type="cosine", warmup_ratio=0.1,
        eval_batch_size=128, **task.run,
    )  # fmt: skip
    result = trained.result
    return {
        **trained.costs(),
        "val": result.after[task.metric],
        "test": result.test[task.metric],
        "test_loss": result.test["loss"],
    }


def write_texts(job: Job, options: Options) -> Path:
    """What the base reads: train and validation texts of the task's records."""
    directory = options.work / f"{name_of(job)}-texts"
    template, several = TASKS[job["task"]].text
    settings = DataSettings(data=str(options.data[job["task"]]))
    for split in ("train", "val"):
        lines = []
        for _, record in find_source(settings, split).open().rows:
            values = record[several] if isinstance(record[several], list) else [record[several]]
            for value in values:
                filled = {k: linearise(k, v) for k, v in record.items() if k != several}
                text = template.format(**filled, **{several: value})
                lines.append(json.dumps({"text": text}) + "\n")
        write_atomically(directory / f"{split}.jsonl", "".join(lines))
    return directory


# ---------------------------------------------------------------- what it says


def describe(done: Results, options: Options) -> str:
    texts = []
    for task in options.data:
        rows = []
        for family in options.families:
            for method in methods_of(family):
                _, rate = best_rate(family, task, method, done, options)
                jobs = [
                    tuning_job(family, task, method, rate, seed, options)
                    for seed in seeds_of(options)
                    if rate is not None
                ]
                if found := [done[job] for job in jobs if job in done]:
                    rows.append([family, method, f"{rate:g}", *summarise(method, found)])
        header = ["base", "method", "learning rate", "trained", "validation", "test", "seconds"]
        texts.append(f"{task}, {TASKS[task].metric}. {describe_bases(task, done, options)}")
        texts.append(table([*header, "tokens/s", "GiB"], rows))
    return "\n\n".join(texts)


def describe_bases(task: str, done: Results, options: Options) -> str:
    jobs = [base_job(family, task, options) for family in options.families]
    bases = [
        f"{job['family']} of {done[job]['parameters'] / 1e6:.2f} M parameters "
        f"(loss {done[job]['loss']:.3g} on the validation texts)"
        for job in jobs
        if job in done
    ]
    return (
        f"The bases are no published models: {' and '.join(bases)}, trained from nothing on the "
        f"texts of the training split for {jobs[0]['steps']} steps. Method none is the base."
    )


def summarise(method: str, found: list[Found]) -> list[str]:
    """The cells of a row, over the seeds."""
    first = found[0]
    share = 0 if method == "none" else first["trainable"] / first["parameters"]
    return [
        f"{share:.2%}",
        *(spread([one[key] for one in found]) for key in ("val", "test")),
        f"{median(one['seconds'] for one in found):.0f}",
        f"{median(finite(one['tokens_per_second']) for one in found):,.0f}",
        f"{median(one['memory_gib'] for one in found):.2f}",
    ]


def draw(axes: Any, done: Results, options: Options) -> None:
    """Test metric over the share of parameters that train."""
    axes.set_xscale("log")
    for column, (family, task) in enumerate(product(options.families, options.data)):
        for method in methods_of(family):
            _, rate = best_rate(family, task, method, done, options)
            if rate is None or method == "none":
                continue
            jobs = [
                tuning_job(family, task, method, rate, seed, options) for seed in seeds_of(options)
            ]
            if found := [done[job] for job in jobs if job in done]:
                percent = 100 if TASKS[task].metric == "accuracy" else 1
                x = found[0]["trainable"] / found[0]["parameters"]
                y = percent * median(one["test"] for one in found)
                axes.plot(x, y, "o^sv"[column % 4], color=f"C{column}", ms=5)
                axes.annotate(method, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.plot([], [], "o^sv"[column % 4], color=f"C{column}", label=f"{family} {task}")
    axes.set_xlabel("share of parameters that train")
    axes.set_ylabel("test: accuracy in percent, or BLEU")
    axes.set_title(TITLE)
