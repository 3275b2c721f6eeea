"""The columns of the page: each check takes a cell to a verdict."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft_tiny import VOCAB, make_batch, make_stock, relative_error, tokens
from torch import Tensor, nn

from matrix.cell import BOUND, DEVICE, Cell, on_device, trainable
from matrix.one_step import take_step, whole
from ssm_train.adapters.base import ModelSpec
from ssm_train.adapters.common import cast_storage, enable_gradient_checkpointing
from ssm_train.adapters.loading import load_weights, save_model
from ssm_train.adapters.registry import adopt
from ssm_train.errors import InputError
from ssm_train.health.liveness import check_liveness
from ssm_train.peft.export import export_adapter, load_adapter
from ssm_train.peft.merge import merge_adapter
from ssm_train.peft.registration import CONFIGS

GRADIENTS = 1e-4
"""fp32: bound of gradients whose sums run in another order."""
CHANGED = 1e-3
"""A function that differs by less than this is not said to be another one."""


@dataclass(frozen=True)
class Verdict:
    works: bool
    text: str
    """What the page shows."""
    figure: float | None = None
    """The difference found: relative in fp32, in bf16 as a multiple of its ordinary error."""


Check = Callable[[Cell, Path], Verdict]


def judge(cell: Cell, error: float, ordinary: float, fp32: float = BOUND) -> Verdict:
    """yes where the error from the exact result is at most `fp32`, or in bf16 twice the `ordinary`
    one, which bf16 has without what is checked."""
    figure, bound = (error, fp32) if cell.prec == "fp32" else (error / ordinary, 2.0)
    return within(bound, figure)


def within(bound: float, figure: float) -> Verdict:
    works = figure <= bound  # not so if it is no number
    return Verdict(works, "yes" if works else f"no: {figure:.1e}", figure)


def errors_of(cell: Cell, logits: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    """Of logits found in the way that is checked, and of those of the plain forward."""
    return cell.error([logits], [exact]), cell.error([plain], [exact])


def first_failure(*verdicts: Verdict) -> Verdict:
    """The first that fails, else the one with the largest figure."""
    failures = [verdict for verdict in verdicts if not verdict.works]
    return failures[0] if failures else max(verdicts, key=lambda verdict: verdict.figure or 0)


# ---------------------------------------------------------------- what trains


def check_alive(cell: Cell, directory: Path) -> Verdict:
    """The preflight passes, and a change of any trained tensor changes the logits."""
    with cell.at_start() as model:
        try:
            check_liveness(model, make_batch().to(DEVICE), cell.token_losses)
        except InputError as error:
            return Verdict(False, f"no: {error}")
    ids = cell.ids[:1, :7]
    before = cell.logits(model, ids)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainable(model).items():
        if parameter.dtype != torch.float32:
            return Verdict(False, f"no: {name} is {parameter.dtype}")
        kept = parameter.detach().clone()
        parameter.data += torch.randn(kept.shape, generator=generator).to(DEVICE)
        changed = cell.logits(model, ids)
        parameter.data.copy_(kept)
        if not relative_error(changed, before) > BOUND:
            return Verdict(False, f"no: {name} changes nothing")
    return Verdict(True, "yes")


def check_arithmetic(cell: Cell, directory: Path) -> Verdict:
    """The trained model in bf16 is as near to its fp32 copy as the base in bf16 is to its own."""
    if cell.prec == "fp32":
        return Verdict(True, "exact")
    error = cell.error([cell.trained_logits], [cell.exact_trained_logits])
    return judge(cell, error, cell.error([cell.base_logits], [cell.exact_base_logits]))


def check_start(cell: Cell, directory: Path) -> Verdict:
    """At step 0 the model computes what the base computes."""
    with cell.at_start() as model:
        logits = cell.logits(model)
    error, ordinary = errors_of(cell, logits, cell.base_logits, cell.exact_base_logits)
    if cell.method.unchanged:
        return judge(cell, error, ordinary)
    assert cell.settings is not None
    reason = CONFIGS[cell.settings["peft_type"]].tuner.changes_function
    works = bool(reason) and error > CHANGED
    return Verdict(works, f"changed: {reason}" if works else "no: it is said to be changed")


# ---------------------------------------------------------------- what is kept of it


def check_files(cell: Cell, directory: Path) -> Verdict:
    """Written and loaded onto the stock base, the tensors and the logits are the same bits."""
    stock = make_stock(cell.family)
    if cell.settings is None:
        save_model(cell.trained.model, directory)
        loaded = load_weights(type(stock), ModelSpec(model=str(directory)))
        adopt(loaded)
        kept, back = cell.trained.model.state_dict(), loaded.state_dict()
    else:
        export_adapter(
            cell.trained.model,
            directory,
            base_id="someone/base",
            traits=cell.trained.traits,
            initial=cell.initial,
        )
        cast_storage(stock, cell.storage, cell.trained.traits.keep_fp32)
        loaded = load_adapter(stock, directory)
        kept = get_peft_model_state_dict(cell.trained.model, save_embedding_layers=False)
        kept = on_the_original_base(kept, cell.initial)
        back = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    if kept.keys() != back.keys() or any(
        not torch.equal(kept[k].cpu(), t.cpu()) for k, t in back.items()
    ):
        return Verdict(False, "no: other tensors")
    logits = cell.logits(on_device(loaded))
    if torch.equal(logits, cell.trained_logits):
        return Verdict(True, "yes", 0.0)
    if DEVICE.type == "cpu" and not cell.initial:  # a GPU's kernels depend on places in memory
        return Verdict(False, "no: other logits")
    return judge(cell, *errors_of(cell, logits, cell.trained_logits, cell.exact_trained_logits))


def on_the_original_base(
    tensors: dict[str, Tensor], initial: dict[str, Tensor]
) -> dict[str, Tensor]:
    """s (B A - B0 A0) as one product: what belongs onto W where training had W - s B0 A0."""

    def doubled(name: str, tensor: Tensor) -> Tensor:
        if name not in initial:
            return tensor
        start = initial[name].to(tensor)
        in_A = ".lora_A." in name
        return torch.cat([tensor, start], 0) if in_A else torch.cat([tensor, -start], 1)

    return {name: doubled(name, tensor) for name, tensor in tensors.items()}


def check_merge(cell: Cell, directory: Path) -> Verdict:
    """Folded into weights, in fp32 whatever the base is stored in, the function is the same."""
    if cell.settings is None:
        return Verdict(True, "nothing to merge")
    used_up = copy.deepcopy(cell.trained)
    try:
        merged = merge_adapter(used_up.model, used_up.traits).model
    except InputError as error:
        return Verdict(not cell.method.merges, f"refused: {error}")
    with torch.no_grad():
        logits = merged(input_ids=cell.ids, use_cache=False).logits
    error = relative_error(logits, cell.exact_trained_logits)
    stock = make_stock(cell.family).state_dict()
    leftovers = sorted(merged.state_dict().keys() ^ stock.keys())
    added = [name for name in leftovers if not name.endswith(".bias")]  # BitFit's new biases
    if not cell.method.merges or added:
        return Verdict(False, f"no: merged, with {added}")
    return within(BOUND, error)


# ---------------------------------------------------------------- the same by another way


@torch.no_grad()
def check_decoding(cell: Cell, directory: Path) -> Verdict:
    """A prompt and then token by token, with a cache, is the forward on all tokens."""
    model, ids = cell.trained.model, cell.ids[:, :9]
    cache_name = "cache_params" if cell.family in ("mamba", "mamba2") else "past_key_values"
    plain, expected = cell.trained_logits[:, :9], cell.exact_trained_logits[:, :9]
    verdicts = []
    for prompt in (1, 2, 6):  # shorter and longer than the convolution's window
        out = cell.forward(model, input_ids=ids[:, :prompt], use_cache=True)
        steps = [out.logits]
        for t in range(prompt, ids.shape[1]):
            cache: dict[str, Any] = {cache_name: getattr(out, cache_name)}
            if cell.family == "bamba":  # as generate does; transformers' would be 0
                cache["position_ids"] = torch.tensor([[t]], device=DEVICE)
            out = cell.forward(model, input_ids=ids[:, t : t + 1], use_cache=True, **cache)
            steps.append(out.logits)
        verdicts.append(judge(cell, *errors_of(cell, torch.cat(steps, 1), plain, expected)))
    return first_failure(*verdicts)


def check_checkpointing(cell: Cell, directory: Path) -> Verdict:
    """With the layers recomputed in the backward pass, each gradient is the same, in bf16 too."""
    model = copy.deepcopy(cell.trained.model).train()
    calls: list[int] = []
    first = next(m for k, m in model.named_modules() if re.search(r"layers\.0\.\w*norm$", k))
    first.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # dropout
        cell.token_losses(model, make_batch().to(DEVICE)).loss.backward()
        return gradients_of(model)

    plain = gradients()
    enable_gradient_checkpointing(model)
    checkpointed = gradients()
    if len(calls) != 1 + 2:
        return Verdict(False, "no: nothing is computed twice")
    return within(BOUND, cell.error(checkpointed, plain))


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Zeros where there is none."""
    return [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainable(model).values()
    ]


def check_packing(cell: Cell, directory: Path) -> Verdict:
    """Documents packed into one row are what they are alone: logits, and gradients."""
    if "packing" not in cell.trained.traits.supports:
        return Verdict(True, f"refused: {cell.family} models cannot be packed")
    lengths = (5, 1, 11)  # shorter than the convolution's window, one token, longer
    parts = [tokens(1, length, seed=length).to(DEVICE) for length in lengths]
    offsets = torch.tensor([0, 5, 6, 17], dtype=torch.int32, device=DEVICE)
    weights = torch.randn(1, 17, VOCAB, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def packed(model: nn.Module) -> Tensor:
        row = torch.cat(parts, 1)
        return cell.forward(model, input_ids=row, cu_seqlens=offsets, use_cache=False).logits

    def alone(model: nn.Module) -> Tensor:
        rows = [cell.forward(model, input_ids=part, use_cache=False).logits for part in parts]
        return torch.cat(rows, 1)

    def exact(model: nn.Module) -> Tensor:
        return torch.cat([model(input_ids=part, use_cache=False).logits for part in parts], 1)

    def differentiate(model: nn.Module, compute: Callable[[nn.Module], Tensor]) -> list[Tensor]:
        logits = compute(model).float()
        values = torch.autograd.grad((logits * weights).sum(), [*trainable(model).values()])
        return [logits.detach(), *values]

    model = cell.trained.model
    expected = differentiate(cell.exact, exact)
    ours, plain = differentiate(model, packed), differentiate(model, alone)

    return first_failure(
        judge(cell, *errors_of(cell, ours[0], plain[0], expected[0])),
        judge(cell, *(cell.error(x[1:], expected[1:]) for x in (ours, plain)), GRADIENTS),
    )


# ---------------------------------------------------------------- two processes


def check_processes(cell: Cell, found: Mapping[str, Tensor]) -> Verdict:
    """Gradients and the optimizer's step that two processes `found`, half the batch each, are those
    of one process."""
    exact = take_step(cell, whole(), exact=True)
    alone = take_step(cell, whole()) if cell.prec == "bf16" else exact
    if found.keys() != alone.keys():
        return Verdict(False, "no: other tensors")

    def error(actual: Mapping[str, Tensor]) -> float:
        return cell.error([actual[k] for k in exact], [*exact.values()])

    return judge(cell, error(found), error(alone), GRADIENTS)


CHECKS: dict[str, Check] = {
    "alive": check_alive,
    "arithmetic": check_arithmetic,
    "step 0 unchanged": check_start,
    "save and load": check_files,
    "merge": check_merge,
    "cached decoding": check_decoding,
    "checkpointing": check_checkpointing,
    "packing": check_packing,
}
