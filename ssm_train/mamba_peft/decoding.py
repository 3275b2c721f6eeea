"""Decoding from token tensors to token tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ssm_train import generate


@dataclass(frozen=True)
class TensorDecoder:
    """A decoder of token tensors: `decoder(model, input_ids) -> answers`."""

    decoder: generate.Decoder

    def __call__(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """`input_ids` [B, T], padded anywhere if `attention_mask` [B, T] says where. Returns
        answers [B, N] int64 on the same device, without the prompts, padded on the right."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[real.bool()].tolist() for row, real in zip(input_ids, mask, strict=True)]
        answers = [torch.tensor(a, dtype=torch.long) for a in self.decoder(model, prompts)]
        padded = pad_sequence(answers, True, float(self.decoder.pad_token_id))
        return padded.to(input_ids.device)


def create_decoder(tokenizer: Any, **eval_gen: Any) -> TensorDecoder:
    """Greedy or beam search, or sampling, by the options of `eval_gen`. Raises InputError."""
    return TensorDecoder(generate.create_decoder(tokenizer, **eval_gen))
