"""Part a: a frozen S6 layer learns to do what another one does, by SDT or by LoRA with as many
parameters (synthetic regression, as Galim et al. 2025, arXiv 2410.09016, test SDT).
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from quality_parts.jobs import Found, Job, Options, Results, finite, spread, sweep, table
from ssm_train import distributed
from ssm_train.adapters.base import Batch, LossSum, Prepared
from ssm_train.adapters.mamba_mixer import MambaMixer
from ssm_train.adapters.registry import FAMILIES, adopt
from ssm_train.engines.replicated import Replicated
from ssm_train.loop import Training, TrainState, train
from ssm_train.optim import OptimSettings, build_optimizer
from ssm_train.peft.coverage import count_parameters
from ssm_train.peft.sd_lora import SdLoraMethod
from ssm_train.peft.spec import load_peft
from ssm_train.schedule import LoopSettings, plan_schedule

TITLE = "a. One S6 layer learns another"
HIDDEN, CHANNELS, STATES, DT_RANK = 64, 128, 16, 4
VOCABULARY, ROWS, LENGTH = 512, 8, 64
WARMUP = 100  # steps in which SDT chooses; LoRA trains so many more
TRAINED_CHANNELS = 22
FEW = 16
TARGETS = {
    "all channels": "A, the x_proj and the dt_proj of the target are drawn anew",
    "few channels": f"in {FEW} of {CHANNELS} channels, A and the columns of x_proj for B and C are",
}
METHODS: dict[str, dict[str, Any]] = {
    "SDT": {
        "peft_type": "SD_LORA",
        "target_modules": ["A_log", "x_proj_B", "x_proj_C"],
        "lora_targets": [],
        "num_freeze": {"channel": CHANNELS - TRAINED_CHANNELS, "state": 0},
    },
    "LoRA on S6": {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["x_proj", "dt_proj"],
        "rank_pattern": {"dt_proj": 3},
    },
    "LoRA on projections": {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["in_proj", "out_proj"],
    },
}
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
SWEEP_SEED = 100
GOAL = 5.0


def tuning_job(target: str, method: str, rate: float, seed: int, options: Options) -> Job:
    steps = 20 if options.quick else 1000
    return {
        "part": "a", "kind": "tuning", "target": target, "method": method, "rate": rate,
        "seed": seed, "steps": steps,
    }  # fmt: skip


def next_jobs(done: Results, options: Options) -> list[Job]:
    jobs = []
    for target in TARGETS:
        for method in METHODS:
            missing, rate = best_rate(target, method, done, options)
            if rate is not None:
                missing = [
                    tuning_job(target, method, rate, seed, options) for seed in range(options.seeds)
                ]
            jobs += missing
    return jobs


def best_rate(
    target: str, method: str, done: Results, options: Options
) -> tuple[list[Job], float | None]:
    return sweep(
        done,
        lambda rate: tuning_job(target, method, rate, SWEEP_SEED, options),
        RATES[:1] if options.quick else RATES,
        lambda found: finite(found["error"]),
    )


# ---------------------------------------------------------------- one job


def run(job: Job, options: Options) -> Found:
    """`error`: mean squared error on inputs that were not trained on, over that of the frozen
    layer, so that 1 is no progress."""
    seed = job["seed"]
    engine = Replicated(distributed.build_accelerator("fp32", options.device))
    target = draw_layer(seed).to(engine.device)
    prepared = Prepared(draw_layer(seed), None, FAMILIES["mamba"]()[0].traits)
    redraw(mixer_of(target), seed, job["target"])
    prepared.model.to(engine.device)

    def squared_error(model: nn.Module, batch: Batch) -> LossSum:
        x = embed(model, batch.input_ids)
        with torch.no_grad():
            wanted = mixer_of(target)(x)
        error = (mixer_of(model)(x) - wanted).square().mean(-1)  # [B, T]
        return LossSum(error.sum(), error.numel())

    def held_out_error() -> float:
        batches = [draw_batch(-1 - i).to(engine.device) for i in range(8)]
        with torch.no_grad():
            sums = [squared_error(prepared.model, batch) for batch in batches]
        return float(sum(s.loss for s in sums) / sum(s.num_targets for s in sums))

    def fit(steps: int, first: int) -> None:
        settings = OptimSettings(learning_rate=job["rate"])
        no_decay = prepared.traits.no_decay
        engine.prepare(prepared.model, lambda net: build_optimizer(net, settings, no_decay))
        training = Training(
            engine=engine, token_losses=squared_error,
            micro_batches=lambda step: [draw_batch(first + step)],
            schedule=plan_schedule(LoopSettings(max_steps=steps), steps), optim=settings,
            prec="fp32", log=lambda row: None, evaluate=None, save=None,
        )  # fmt: skip
        train(training, TrainState())

    start = held_out_error()
    peft = load_peft(METHODS[job["method"]])
    assert peft is not None
    distributed.seed_everything(seed)
    method: Any = peft.make()
    method.inject(prepared)
    if isinstance(method, SdLoraMethod):
        fit(WARMUP, 0)
        method.begin_training(prepared, method.select(prepared.model))
        fit(job["steps"], WARMUP)
    else:
        fit(WARMUP + job["steps"], 0)
    return {"error": held_out_error() / start, "trainable": count_parameters(prepared.model)[0]}


def draw_layer(seed: int) -> MambaForCausalLM:
    """A model of one layer, of which the mixer alone is used. A_log is drawn as well: a new Mamba
    has the same A in every channel."""
    torch.manual_seed(seed)
    config = MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        state_size=STATES,
        time_step_rank=DT_RANK,
        time_step_min=0.01,
    )
    model = MambaForCausalLM(config)
    adopt(model)
    nn.init.normal_(model.backbone.embeddings.weight)
    mixer = mixer_of(model)
    with torch.no_grad():
        for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        mixer.A_log.uniform_(-1, 3)
    return model


@torch.no_grad()
def redraw(mixer: MambaMixer, seed: int, what: str) -> None:
    """Makes the frozen layer the target."""
    torch.manual_seed(seed + 1_000)
    other = mixer_of(draw_layer(seed + 1_000))
    if what == "all channels":
        mixer.A_log.copy_(other.A_log)
        mixer.x_proj.weight.copy_(other.x_proj.weight)
        mixer.dt_proj.load_state_dict(other.dt_proj.state_dict())
        return
    few = torch.randperm(CHANNELS)[:FEW]
    mixer.A_log[few] = other.A_log[few]
    mixer.x_proj.weight[DT_RANK:, few] = other.x_proj.weight[DT_RANK:, few]


def mixer_of(model: nn.Module) -> MambaMixer:
    return next(module for module in model.modules() if isinstance(module, MambaMixer))


def embed(model: Any, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids)


def draw_batch(number: int) -> Batch:
    """Random tokens, the same for the same number."""
    ids = torch.randint(
        VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(number % 2**32)
    )
    return Batch(
        input_ids=ids,
        target_positions=torch.arange(ids.numel()),
        targets=ids.flatten(),
        sequence_ids=torch.arange(ROWS)[:, None].expand(ROWS, LENGTH),
        position_ids=torch.arange(LENGTH).expand(ROWS, LENGTH),
        num_tokens=ids.numel(),
    )


# ---------------------------------------------------------------- what it says


def errors(target: str, method: str, done: Results, options: Options) -> list[Found]:
    _, rate = best_rate(target, method, done, options)
    if rate is None:
        return []
    jobs = [tuning_job(target, method, rate, seed, options) for seed in range(options.seeds)]
    return [done[job] for job in jobs if job in done]


def describe(done: Results, options: Options) -> str:
    rows, verdicts = [], []
    for target in TARGETS:
        lists = {method: errors(target, method, done, options) for method in METHODS}
        for method, found in lists.items():
            if found:
                rate = best_rate(target, method, done, options)[1]
                values = [finite(one["error"]) for one in found]
                rows.append([target, method, found[0]["trainable"], f"{rate:g}", spread(values)])
        times = [
            min(finite(other["error"]) for other in others) / finite(sdt["error"])
            for sdt, *others in zip(*lists.values(), strict=False)
        ]
        if times:
            verdict = "yes" if median(times) >= GOAL else "no"
            verdicts.append([target, spread(times), f"{GOAL:g}", verdict])
    header = ["target", "method", "trained", "learning rate", "error / error of the frozen layer"]
    summary = ["target", "error of the better LoRA / error of SDT", "goal", "met"]
    return "\n\n".join([table(header, rows), table(summary, verdicts)])


def draw(axes: Any, done: Results, options: Options) -> None:
    axes.set_yscale("log")
    for column, method in enumerate(METHODS):
        for place, target in enumerate(TARGETS):
            values = [finite(one["error"]) for one in errors(target, method, done, options)]
            x = [place + 0.2 * (column - 1)] * len(values)
            axes.plot(x, values, "o", color=f"C{column}", label=method if place == 0 else None)
    axes.set_xticks(range(len(TARGETS)), list(TARGETS))
    axes.set_ylabel("error / error of the frozen layer")
    axes.set_title(TITLE)
