"""Decoding on one GPU beside the stock libraries, LoRA on all projections of random models, bf16.

    python benchmarks/generation_gpu.py gla-1.3b mamba-1.4b --out generation.json

Arms take turns in one process on the same prompts of 20 to 60 tokens: `graphs`, a token as a replay
of a CUDA graph; `eager`, the same model without; `stock`, fla's or transformers' own class with the
same weights under plain peft, all in bf16 without autocast. PEFT refuses `out_proj` of a stock
Mamba, so that there the stock has a projection less to adapt. Greedy, and no answer ends early.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from throughput import MODELS, SPECIAL, build_model

from ssm_train import distributed
from ssm_train.generate import Decoder, language_model, read_options
from ssm_train.metrics import peak_memory_gib
from ssm_train.record.environment import describe_environment

RANK = 16
ARMS = ("graphs", "eager", "stock")
TARGETS = {"gla": "all-linear", "mamba": ["in_proj", "x_proj", "dt_proj"], "mamba2": ["in_proj"]}


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ours(config: dict[str, Any], targets: list[str] | str = "all-linear") -> torch.nn.Module:
    _, prepared = build_model(config, DEVICE, rank=RANK, targets=targets)
    for name, parameter in prepared.model.named_parameters():
        if "lora_B" in name:  # as after training
            torch.nn.init.normal_(parameter, std=0.02)
    return prepared.model


def stock(
    net: torch.nn.Module, targets: list[str] | str, adapters: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The stock class of the same configuration, with the weights of ours."""
    import fla.models  # noqa: F401  registers its models
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(language_model(net).config)
    kind: Any = config.model_type
    if kind == "gla":
        config.fuse_swiglu = False  # it reads the weight of down_proj past its LoRA
    with torch.device(DEVICE):
        theirs = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
    theirs = get_peft_model(theirs, lora, autocast_adapter_dtype=adapters == torch.float32)
    missing = theirs.load_state_dict(net.state_dict(), strict=False).missing_keys
    assert not [name for name in missing if "lora" in name], missing
    return theirs


def draw_prompts(count: int, vocabulary: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(1, vocabulary, draw.integers(20, 61)).tolist() for _ in range(count)]


def compare(model: str, arms: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    config = MODELS[model] | SPECIAL
    torch.manual_seed(0)
    net = ours(config)
    nets = {arm: net for arm in arms if arm != "stock"}
    if "stock" in arms:
        nets["stock"] = stock(net, TARGETS[config["model_type"]], torch.bfloat16)
    new = arguments.new_tokens
    options = read_options({"max_new_tokens": new, "min_new_tokens": new})
    device = torch.device("cuda")
    autocast = partial(distributed.autocast, "bf16", device)
    make = partial(Decoder, options, 0, 0, arguments.batch_size)
    decoders = {
        "graphs": make(autocast),
        "eager": make(autocast, steps="eager"),
        "stock": make(nullcontext, steps="eager"),
    }
    prompts = draw_prompts(arguments.batch_size * arguments.batches, config["vocab_size"])
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    answers: dict[str, list[list[int]]] = {}
    peaks: dict[str, float] = {}
    for turn in range(arguments.turns + 1):
        for arm in arms:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            began = time.perf_counter()
            answers[arm] = decoders[arm](nets[arm], prompts)
            torch.cuda.synchronize()
            took = time.perf_counter() - began
            assert all(len(answer) == new for answer in answers[arm])
            peaks[arm] = peak_memory_gib()
            if turn:  # the first one compiles and tunes
                seconds[arm].append(took)
            print(f"  {arm}: {took:.2f} s{'' if turn else ' (first)'}", flush=True)
    tokens = len(prompts) * new
    rates = {arm: tokens / median(seconds[arm]) for arm in arms}
    first = np.array(answers[arms[0]])
    equal = {arm: float((np.array(answers[arm]) == first).mean()) for arm in arms}
    for arm in arms:
        print(
            f"{model} {arm}: {median(seconds[arm]):.2f} s, {rates[arm]:,.0f} tokens/s; {arms[0]}: "
            f"{rates[arms[0]] / rates[arm]:.2f} times as fast, {equal[arm]:.1%} of tokens equal"
        )
    return {"seconds": seconds, "tokens_per_second": rates, "peak_gib": peaks, "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=1, help="of prompts in a turn")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": describe_environment(), "models": {}}
    for model in arguments.models:
        print(model, flush=True)
        results["models"][model] = compare(model, arguments.arms, arguments)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
