"""The examples of a split, one by one and in padded batches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ssm_train.data import DataSettings
from ssm_train.data.sources import SPLITS, load_task_data
from ssm_train.data.tasks.text import ClassificationTask
from ssm_train.data.tokens import TokenizedDataset
from ssm_train.errors import InputError
from ssm_train.loss import IGNORED


class ExampleDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The examples of a split as the old code had them: {input_ids, label_ids}, both [T] int64.

    In mode "lm" `label_ids[t]` is the token after `input_ids[t]`, -100 where it is not learnt; in
    mode "gen" prompt and (first) answer are apart.
    """

    def __init__(self, examples: TokenizedDataset, tokenizer: Any, mode: str) -> None:
        self.examples, self.tokenizer, self.mode = examples, tokenizer, mode

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        i = range(len(self))[i]
        ids = torch.from_numpy(self.examples.example_ids(i).astype(np.int64))
        if self.mode == "gen":
            prompt = int(self.examples.prompt_lengths[i])
            return {"input_ids": ids[:prompt], "label_ids": ids[prompt:]}
        learnt = torch.from_numpy(self.examples.learnt(i)[1:].copy())
        return {"input_ids": ids[:-1], "label_ids": torch.where(learnt, ids[1:], IGNORED)}

    def compute_metrics(self, eval_preds: Any) -> dict[str, float]:
        """The task's metrics.

        Mode "gen": `eval_preds.preds` are texts, of all examples in their order. Classification in
        mode "lm": `eval_preds.predictions` and `label_ids` are logits [1, V] and the token [1] of
        any examples at their labels. Else nothing is measured. Raises InputError.
        """
        task = self.examples.task
        if self.mode == "gen":
            if len(eval_preds.preds) != len(self):
                raise InputError(
                    f"compute_metrics: {len(eval_preds.preds)} preds for the {len(self)} examples "
                    f"of {self.examples.name}; give one for each, in their order"
                )
            return task.score(
                list(eval_preds.preds),
                [self.examples.references(i) for i in range(len(self))],
                [self.examples.context(i) for i in range(len(self))],
            )
        if not isinstance(task, ClassificationTask):
            return {}
        words = dict(zip(self.examples.class_ids, task.words, strict=True))
        likeliest = np.concatenate([np.asarray(p) for p in eval_preds.predictions]).argmax(-1)
        right = np.concatenate([np.asarray(t) for t in eval_preds.label_ids])
        return task.score(
            [words.get(int(token), "") for token in likeliest],
            [[words[int(token)]] for token in right],
            [""] * len(right),
        )


@dataclass(frozen=True)
class DataCollator:
    """Pads rows on the right: {input_ids, label_ids [B, T] int64, attention_mask [B, T] bool}."""

    tokenizer: Any

    def __call__(self, instances: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        ids = [instance["input_ids"] for instance in instances]
        labels = [instance["label_ids"] for instance in instances]
        real = [torch.ones(len(row), dtype=torch.bool) for row in ids]  # by place, not by id
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        return {
            "input_ids": pad_sequence(ids, True, float(pad)),
            "label_ids": pad_sequence(labels, True, float(IGNORED)),
            "attention_mask": pad_sequence(real, True, 0.0),
        }


@dataclass(frozen=True)
class DataModule:
    """A split and what makes batches of it."""

    dataset: ExampleDataset
    data_collator: DataCollator


def load_dataset(
    data: str,
    tokenizer: Any,
    split: str,
    mode: Literal["lm", "gen"] = "lm",
    return_module: bool = False,
) -> ExampleDataset | DataModule:
    """The split train, val or test of a data set, by the names of `data:` in a run config.

    It is tokenized in this process: scripts are often not made to be imported by others. Raises
    InputError.
    """
    for name, value, known in (("mode", mode, ("lm", "gen")), ("split", split, tuple(SPLITS))):
        if value not in known:
            raise InputError(f"{name} is {value!r}; expected {' or '.join(known)}")
    settings = DataSettings(
        data=data,
        data_root=os.environ.get("SSM_TRAIN_DATA"),
        cache_dir=os.environ.get("SSM_TRAIN_CACHE"),
        num_data_workers=0,
    )
    dataset = ExampleDataset(load_task_data(settings, tokenizer, split), tokenizer, mode)
    return DataModule(dataset, DataCollator(tokenizer)) if return_module else dataset
