"""What a run proves of itself before its first step: every trained tensor is alive, and packed
documents are apart. Kernels that the step launches are compiled first.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from ssm_train import distributed
from ssm_train.adapters.base import Batch
from ssm_train.data.batches import collate, pack
from ssm_train.isolation import check_isolation
from ssm_train.peft.liveness import check_liveness, unchanged

if TYPE_CHECKING:
    from ssm_train.fit import Ready

FULL_ROW = 4096  # tokens from which on kernels choose as they do for longer rows


def compile_kernels(ready: Ready) -> None:
    """All ranks. What a training step launches, before it would be compiled one by one."""
    device, prepared = ready.accelerator.device, ready.subject.prepared
    if device.type != "cuda" or not any("riton" in name for name in prepared.kernels.values()):
        return
    from ssm_train.kernels.compiling import compile_ahead  # triton, which a CPU may do without

    batch = ready.micro_batches(0)[0].to(device)
    try:
        with unchanged(prepared.model, training=True), compile_ahead():
            ready.token_losses(prepared.model, batch).loss.backward()
    except Exception as error:  # what is wrong shows again when kernels run
        reason = str(error).partition("\n")[0]
        warnings.warn(f"kernels are compiled one after the other: {reason}", stacklevel=2)


def prove_alive(ready: Ready) -> None:
    """All ranks. Raises InputError naming a trainable tensor without a gradient."""
    check_liveness(
        ready.subject.prepared.model,
        ready.micro_batches(0)[0].to(ready.accelerator.device),
        ready.token_losses,
        reduce_max=distributed.reduce_max,
    )


def prove_isolated(ready: Ready) -> None:
    """All ranks, on the same two documents. Raises InputError where packed ones touch."""
    cfg, device, adapter = ready.cfg, ready.accelerator.device, ready.subject.adapter
    examples, row = ready.data["train"], ready.order.micro_batches(0)[0]
    shortest = row[np.argsort(examples.lengths[row], kind="stable")[:2]]
    documents = np.resize(shortest, 2)  # the same one twice where there is one alone
    lengths = examples.lengths[documents]
    if device.type == "cpu":
        pair = pack(examples, documents, int(lengths.sum()))
        alone = collate(examples, documents[1:])
    else:  # padded rows have kernels of their own, which nothing has compiled
        tokens = compiled_length(int(lengths.sum()), cfg.row_tokens)
        pair, alone = (pack(examples, documents[i:], tokens) for i in range(2))
    second = pair.target_positions >= int(lengths[0])
    pair.targets, pair.target_positions = pair.targets[second], pair.target_positions[second]

    def token_logits(model: nn.Module, batch: Batch) -> Tensor:
        with distributed.autocast(cfg.prec, device):
            return adapter.token_logits(model, batch)

    check_isolation(
        ready.subject.prepared.model, pair.to(device), alone.to(device), ready.token_losses,
        token_logits, exact=cfg.prec == "fp32" and device.type == "cpu",
    )  # fmt: skip


def compiled_length(tokens: int, row: int) -> int:
    """The length of a row for so many tokens, in a run with rows of `row`, for which hardly any
    kernel has to be compiled beside the run's own: they also ask whether 16 divides it."""
    return max(-(-tokens // 16) * 16, min(row, FULL_ROW))
