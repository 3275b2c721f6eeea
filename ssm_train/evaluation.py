"""The evaluation of a data set: what is measured, in which batches; it may be given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ssm_train.adapters.base import Batch, TokenLosses
from ssm_train.data.batches import batches_by_length, collate
from ssm_train.data.tasks.text import ClassificationTask
from ssm_train.data.tokens import TokenizedDataset
from ssm_train.evaluate import (
    Gather,
    Row,
    describe_choices,
    evaluate_classification,
    evaluate_generation,
    evaluate_loss,
    slice_of_rank,
)
from ssm_train.generate import Autocast, Decoder
from ssm_train.stop_flag import Interrupted
from ssm_train.watchdog import beat

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """What evaluating a data set needs to know; `rank` and `world_size` slice the examples."""

    dataset: TokenizedDataset
    tokenizer: Any
    token_losses: TokenLosses
    token_logits: Callable[[nn.Module, Batch], Tensor]
    batch_size: int
    decoder: Decoder | None = None  # None: generation tasks are measured by their loss alone
    autocast: Autocast = nullcontext
    rank: int = 0
    world_size: int = 1
    gather: Gather = list
    reduce_sum: Callable[[Tensor], Tensor] = torch.Tensor.clone

    def run(
        self, model: nn.Module, stop: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], list[Row]]:
        """All ranks. Loss, perplexity and the task's metrics; and what was predicted. Raises
        Interrupted on all where `stop` is true between two batches of one."""

        def between() -> None:
            beat()
            if stop():
                raise Interrupted

        everything = range(len(self.dataset))
        task, prompts = self.dataset.task, [self.dataset.prompt_ids(i).tolist() for i in everything]
        if isinstance(task, ClassificationTask):
            values, choices = evaluate_classification(
                model, self.batches(between), self.token_logits, self.dataset.class_ids, task.words,
                task.score, self.gather, self.autocast, self.jointly,
            )  # fmt: skip
            return values, describe_choices(
                choices, self.tokenizer, prompts, self.dataset.class_ids
            )
        values = evaluate_loss(
            model, self.batches(between), self.token_losses, self.reduce_sum, self.autocast,
            self.jointly,
        )  # fmt: skip
        if self.decoder is None or not task.metrics:
            return values, []
        scores, rows = evaluate_generation(
            model, self.decoder, self.tokenizer, prompts,
            [self.dataset.references(i) for i in everything],
            [self.dataset.context(i) for i in everything],
            task.score, self.gather, rank=self.rank, world_size=self.world_size, between=between,
            jointly=self.jointly,
        )  # fmt: skip
        return values | scores, rows

    def jointly(self, work: Callable[[], T]) -> T:
        """See `Jointly`; what is raised is Interrupted."""
        done: list[T] = []
        with suppress(Interrupted):
            done.append(work())
        if not all(self.gather([bool(done)])):
            raise Interrupted
        return done[0]

    def batches(self, between: Callable[[], None]) -> Iterator[Batch]:
        """This rank's examples, each once, in batches of similar lengths."""
        mine = np.array(slice_of_rank(len(self.dataset), self.rank, self.world_size))
        if len(mine):
            for places in batches_by_length(self.dataset.lengths[mine], self.batch_size):
                between()
                yield collate(self.dataset, mine[places])
