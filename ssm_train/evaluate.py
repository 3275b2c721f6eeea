"""How held-out examples are measured, by all processes together; every example counts once.

Ranks evaluate slices, their rows are gathered and sorted by example; metrics see all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ssm_train.adapters.base import Batch, TokenLosses
from ssm_train.durable import write_atomically
from ssm_train.errors import InputError
from ssm_train.generate import Autocast, Decoder, evaluation_mode, read_options
from ssm_train.scores import OUT_OF_CLASS
from ssm_train.settings import Settings
from ssm_train.watchdog import beat, unwatched

T = TypeVar("T")

Gather = Callable[[list[Any]], list[Any]]  # all ranks: the lists of every rank, concatenated
Score = Callable[[Sequence[str], Sequence[Sequence[str]], Sequence[str]], dict[str, float]]
"""`Task.score`: answers, right answers and contexts of all examples -> metrics."""


Jointly = Callable[[Callable[[], Any]], Any]
"""All ranks: gives what this rank's part of some work gives, or raises on all of them."""


def alone(work: Callable[[], T]) -> T:
    return work()


class EvalSettings(Settings):
    """What evaluation measures."""

    eval_gen: dict[str, Any] | None = None
    """Generate when evaluating: {max_new_tokens, num_beams, do_sample, ...} as in `transformers`,
    but that `max_length` is the answer's; {}: greedily, up to 128 tokens."""
    metric_for_best: str | None = None
    """Metric that chooses the best checkpoint; None: the task's main metric."""
    max_eval_examples: int | None = Field(default=None, ge=1)
    """Evaluate on the first so many examples of a split; None: on all."""

    @field_validator("eval_gen")
    @classmethod
    def check_eval_gen(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            read_options(value)
        return value


@dataclass(frozen=True)
class Row:
    """One example's outcome, as text and as token ids."""

    example: int  # index in the data set
    input: str
    input_ids: list[int]
    prediction: str
    prediction_ids: list[int]
    labels: list[str]  # several references: all of them
    label_ids: list[list[int]]


# ---------------------------------------------------------------- loss


def evaluate_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    token_losses: TokenLosses,
    reduce_sum: Callable[[Tensor], Tensor],
    autocast: Autocast = nullcontext,
    jointly: Jointly = alone,
) -> dict[str, float]:
    """All ranks, each with its own batches. Loss in nats a supervised token, over all processes.

    Returns `loss`, `perplexity` = exp(loss) and `tokens` (supervised ones).
    """
    sums = jointly(lambda: sum_losses(model, batches, token_losses, autocast))
    loss_sum, tokens = reduce_sum(sums).tolist()
    assert tokens > 0, "no supervised token in any batch of any process"
    return loss_metrics(loss_sum, int(tokens))


def sum_losses(
    model: nn.Module, batches: Iterable[Batch], token_losses: TokenLosses, autocast: Autocast
) -> Tensor:
    """[2] fp64: this rank's loss and its number of targets."""
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluation_mode(model):
        for batch in batches:
            with autocast():
                result = token_losses(model, batch.to(device))
            sums[0] += result.loss
            sums[1] += result.num_targets
    return sums


def loss_metrics(loss_sum: float, tokens: int) -> dict[str, float]:
    loss = loss_sum / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf if loss > 0 else math.nan
    return {"loss": loss, "perplexity": perplexity, "tokens": tokens}


# ---------------------------------------------------------------- classification


@dataclass(frozen=True)
class Choice:
    """One example's outcome over the label tokens. Class indices are places in `label_ids`."""

    example: int  # index in the data set
    target: int
    choice: int  # class with the highest score
    top_token: int  # likeliest token of the whole vocabulary
    out_of_class: bool  # that token is likelier than every label token
    loss: float  # of the label token over the whole vocabulary, nats
    scores: tuple[float, ...]  # [C] logits of the label tokens

    @property
    def prediction(self) -> int:
        """The class that counts."""
        return OUT_OF_CLASS if self.out_of_class else self.choice


def choose_labels(
    model: nn.Module,
    batches: Iterable[Batch],
    token_logits: Callable[[nn.Module, Batch], Tensor],
    label_ids: Sequence[int],
    autocast: Autocast = nullcontext,
) -> list[Choice]:
    """This rank's choices. Every document has one supervised token, its label."""
    device = next(model.parameters()).device
    labels = torch.tensor(list(label_ids), device=device)
    choices = []
    with evaluation_mode(model):
        for batch in batches:
            batch = batch.to(device)
            with autocast():
                logits = token_logits(model, batch).float()  # [S, V]
            losses = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            scores = logits[:, labels]  # [S, C]
            top = logits.max(dim=-1)
            best = scores.max(dim=-1)
            matches = batch.targets[:, None] == labels  # [S, C]
            assert bool(matches.any(-1).all()), "a label token is not in label_ids"
            documents = batch.sequence_ids.flatten()[batch.target_positions]
            columns = (
                [batch.example_ids[i] for i in documents.tolist()],
                matches.int().argmax(-1).tolist(),
                best.indices.tolist(),
                top.indices.tolist(),
                (top.values > best.values).tolist(),
                losses.tolist(),
                [tuple(row) for row in scores.tolist()],
            )
            choices += [Choice(*row) for row in zip(*columns, strict=True)]
    return choices


def evaluate_classification(
    model: nn.Module,
    batches: Iterable[Batch],
    token_logits: Callable[[nn.Module, Batch], Tensor],
    label_ids: Sequence[int],
    words: Sequence[str],
    score: Score,
    gather: Gather,
    autocast: Autocast = nullcontext,
    jointly: Jointly = alone,
) -> tuple[dict[str, float], list[Choice]]:
    """All ranks, each with its own batches; the same result on each.

    `label_ids`, `words` [C]: token and name of each class. An example whose likeliest token is no
    label has no word, so that it counts as wrong. Loss and perplexity come along.
    """
    mine = jointly(lambda: choose_labels(model, batches, token_logits, label_ids, autocast))
    choices = gather_in_order(mine, gather)
    values = loss_metrics(math.fsum(c.loss for c in choices), len(choices))
    predictions = ["" if c.out_of_class else words[c.choice] for c in choices]
    values |= score(predictions, [[words[c.target]] for c in choices], [""] * len(choices))
    return values, choices


def describe_choices(
    choices: Sequence[Choice],
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    label_ids: Sequence[int],
) -> list[Row]:
    """Rows for `write_predictions`; the prediction is the likeliest token, label or not."""
    return [
        Row(
            example=c.example,
            input=tokenizer.decode(prompts[c.example]),
            input_ids=[int(t) for t in prompts[c.example]],
            prediction=tokenizer.decode([top := predicted_token(c, label_ids)]),
            prediction_ids=[top],
            labels=[tokenizer.decode([label_ids[c.target]])],
            label_ids=[[label_ids[c.target]]],
        )
        for c in choices
    ]


def predicted_token(choice: Choice, label_ids: Sequence[int]) -> int:
    return choice.top_token if choice.out_of_class else label_ids[choice.choice]


# ---------------------------------------------------------------- generation


def evaluate_generation(
    model: nn.Module,
    decoder: Decoder,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[str]],
    contexts: Sequence[str],
    score: Score,
    gather: Gather,
    *,
    rank: int = 0,
    world_size: int = 1,
    between: Callable[[], None] = beat,
    jointly: Jointly = alone,
) -> tuple[dict[str, float], list[Row]]:
    """All ranks, with all prompts each; the same result on each.

    `prompts`: token ids; `references[i]`: one or more right answers as text; `contexts[i]`: what
    `score` must know of the example. Rows are in order.
    """
    mine = slice_of_rank(len(prompts), rank, world_size)
    answers = jointly(lambda: decoder(model, [prompts[i] for i in mine], between))
    rows = gather_in_order(
        [
            Row(
                example=i,
                input=tokenizer.decode(prompts[i]),
                input_ids=[int(t) for t in prompts[i]],
                prediction=tokenizer.decode(answer),  # a stray special token is a mistake
                prediction_ids=answer,
                labels=list(references[i]),
                label_ids=[
                    tokenizer(text, add_special_tokens=False)["input_ids"] for text in references[i]
                ],
            )
            for i, answer in zip(mine, answers, strict=True)
        ],
        gather,
    )
    assert len(rows) == len(prompts), (len(rows), len(prompts))
    predictions = [row.prediction for row in rows]
    return score_once(lambda: score(predictions, references, contexts), gather, rank), rows


def score_once(
    score: Callable[[], dict[str, float]], gather: Gather, rank: int
) -> dict[str, float]:
    """All ranks. Rank 0 scores: what a time limit cuts off is the same everywhere, and what it
    cannot score stops every rank instead of leaving the others waiting."""
    outcome: list[dict[str, float] | InputError] = []
    with unwatched():
        if rank == 0:
            try:
                outcome = [score()]
            except InputError as error:
                outcome = [error]
        (first,) = gather(outcome)
    if isinstance(first, InputError):
        raise first
    return first


def slice_of_rank(examples: int, rank: int, world_size: int) -> range:
    """The examples that a rank evaluates: a partition, of sizes that differ by at most one."""
    return range(rank, examples, world_size)


def gather_in_order(rows: list[Any], gather: Gather) -> list[Any]:
    """All ranks. The rows of all ranks by `example`; one that several ranks had counts once."""
    by_example = {row.example: row for row in gather(rows)}
    return [by_example[i] for i in sorted(by_example)]


def write_predictions(run_dir: Path, split: str, step: int, rows: Iterable[Row]) -> Path:
    """Rank 0. `predictions-<step>.jsonl`, of the test split `predictions-test-<step>.jsonl`: one
    JSON object a line, in the order of `rows`."""
    name = f"predictions-{step}" if split == "val" else f"predictions-{split}-{step}"
    path = Path(run_dir) / f"{name}.jsonl"
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
    write_atomically(path, "".join(lines))
    return path
