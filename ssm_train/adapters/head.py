"""The end of every family's language model: logits where they are asked for, or the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ssm_train.adapters.modules import LmHead, stored_weight
from ssm_train.loss import sum_cross_entropy


def outputs(
    lm: Any,
    hidden: Tensor,
    *,
    target_positions: Tensor | None = None,
    targets: Tensor | None = None,
    labels: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    **loss_kwargs: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """The end of every family's CausalLM forward: hidden [B, T, H] -> (loss, logits fp32).

    * `target_positions` [S] (indices into B * T) and `targets` [S]: the loss summed over the
      targets, and no logits;
    * `target_positions` alone: logits [S, V];
    * `labels` [B, T]: Hugging Face's meaning, shifted inside, mean over labels that are not -100;
    * else the logits of the last `logits_to_keep` positions, or of all.
    """
    assert targets is None or target_positions is not None, "targets need target_positions"
    if target_positions is not None and targets is not None:
        return target_loss(hidden, lm.lm_head, target_positions, targets), None
    if target_positions is not None:
        return None, target_logits(hidden, lm.lm_head, target_positions)
    if labels is None and isinstance(logits_to_keep, int):
        hidden = hidden[:, -logits_to_keep:]  # 0 keeps all
    elif labels is None:
        hidden = hidden[:, logits_to_keep]
    logits = lm.lm_head(hidden.to(stored_weight(lm.lm_head).dtype)).float()
    if labels is None:
        return None, logits
    loss = lm.loss_function(
        logits=logits, labels=labels, vocab_size=lm.config.vocab_size, **loss_kwargs
    )
    return loss, logits


def target_loss(hidden: Tensor, lm_head: nn.Module, positions: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over flat `positions` [S] of hidden [B, T, H]: [] fp32."""
    if isinstance(lm_head, LmHead) and lm_head.gives_loss_of(hidden):
        loss: Tensor = lm_head(hidden, positions, targets)
        return loss
    return sum_cross_entropy(target_logits(hidden, lm_head, positions), targets)


def target_logits(hidden: Tensor, lm_head: nn.Module, positions: Tensor) -> Tensor:
    """Logits [S, V] fp32 at flat `positions` [S] of hidden [B, T, H], and nowhere else."""
    chosen = hidden.flatten(0, 1)[positions]
    return lm_head(chosen.to(stored_weight(lm_head).dtype)).float()
