"""The functions of the code base `mamba-peft`, which this package replaces, with their signatures
and return shapes, over the adapters and the loop."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ssm_train import generate
from ssm_train.adapters import registry
from ssm_train.adapters.base import ModelAdapter, ModelSpec, PeftMethod, Prepared, Traits
from ssm_train.assemble import STORAGE, Subject
from ssm_train.config import read_peft_overrides, resolve_config
from ssm_train.data import DataSettings
from ssm_train.data.sources import SPLITS, load_task_data
from ssm_train.data.tasks.text import ClassificationTask
from ssm_train.data.tokens import TokenizedDataset
from ssm_train.errors import InputError
from ssm_train.loss import IGNORED
from ssm_train.overrides import DIRECTORIES
from ssm_train.peft.spec import TWO_STAGES, PeftSpec, load_peft
from ssm_train.record.summary import Result
from ssm_train.strict_yaml import Document
from ssm_train.train import run

OF_OLD_CODE = ("cfg_path", "is_sdlora", "output_dir")  # what it kept in a run's cfg


@dataclass(frozen=True)
class Origin:
    """What is known of a model that a function here prepared."""

    model_id: str
    tokenizer_id: str | None
    prec: str
    peft: str | None
    reason: str
    adapter: ModelAdapter
    traits: Traits
    kernels: dict[str, str]
    method: PeftMethod | None


ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


# ---------------------------------------------------------------- models


def prepare_gla_model_and_tokenizer(
    model_id: str, prec: str, debug: bool, peft_json_path: str | None
) -> tuple[nn.Module, Any, Any]:
    """(model, tokenizer, PEFT config or None): GLA with the checkpoint's own tokenizer and, with a
    PEFT JSON, its factors injected; HP_* variables win over the JSON.

    `debug` chooses nothing: without a GPU every model runs on the CPU. Raises InputError.
    """
    spec = _read_spec(peft_json_path)
    model, tokenizer = _prepare(ModelSpec(model=model_id), ("gla",), prec, peft_json_path, spec)
    return model, tokenizer, _peft_config(model)


def prepare_mamba_model_and_tokenizer(
    model_id: str,
    tokenizer_id: str,
    prec: str,
    backend: str,
    is_custom_tokenizer: bool,
    peft_json_path: str | None,
    no_print: bool = True,
) -> tuple[nn.Module, Any, Any, bool]:
    """(model, tokenizer, PEFT config or None, whether the method is SDLoRA): a Mamba-1 or Mamba-2
    with the tokenizer asked for.

    `backend`: "cuda" takes the fastest kernels that are there, another name plain PyTorch. A custom
    tokenizer has rows of the embedding of its own: with PEFT the embedding is trained in full.
    `no_print` False names the trainable parameters. Raises InputError.
    """
    peft = _read_spec(peft_json_path)
    if peft and is_custom_tokenizer:
        peft = _with_embedding(peft)
    spec = ModelSpec(
        model=model_id,
        tokenizer=tokenizer_id,
        kernels="auto" if backend == "cuda" else "reference",
    )
    model, tokenizer = _prepare(spec, ("mamba", "mamba2"), prec, peft_json_path, peft)
    if not no_print:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                print(f"{name} {tuple(parameter.shape)}")  # noqa: T201
    return model, tokenizer, _peft_config(model), peft is not None and peft.peft_type in TWO_STAGES


def _read_spec(peft_json_path: str | None) -> PeftSpec | None:
    return load_peft(peft_json_path, read_peft_overrides(os.environ))


def _with_embedding(peft: PeftSpec) -> PeftSpec:
    if peft.peft_type != "LORA":
        raise InputError(
            f"is_custom_tokenizer: {peft.peft_type} cannot train the new embedding too; use LORA, "
            "or train the base on the tokenizer first"
        )
    saved = [*(getattr(peft.settings, "modules_to_save", None) or []), "embeddings"]
    return replace(peft, settings=peft.settings.model_copy(update={"modules_to_save": saved}))


def _prepare(
    spec: ModelSpec,
    families: Sequence[str],
    prec: str,
    peft_json_path: str | None,
    peft: PeftSpec | None,
) -> tuple[nn.Module, Any]:
    if prec not in STORAGE:
        raise InputError(f"prec is {prec!r}; expected {', '.join(STORAGE)}")
    adapter, reason = registry.resolve(spec)
    if adapter.name not in families:
        raise InputError(f"model: {spec.model} is {reason}; expected {' or '.join(families)}")
    spec = replace(
        spec,
        dtype=STORAGE[prec] if peft else torch.float32,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    prepared = adapter.prepare(spec)
    method = peft.make() if peft else None
    if method:
        method.inject(prepared)
    ORIGINS[prepared.model] = Origin(
        str(spec.model), spec.tokenizer, prec, peft_json_path, reason, adapter, prepared.traits,
        prepared.kernels, method,
    )  # fmt: skip
    return prepared.model, prepared.tokenizer


def _peft_config(model: nn.Module) -> Any:
    """Hugging Face PEFT's configuration of what was injected."""
    configs = getattr(model, "peft_config", None)
    return next(iter(configs.values())) if isinstance(configs, dict) else None


# ---------------------------------------------------------------- training


def build_and_run_trainer(
    *,
    model: nn.Module,
    tokenizer: Any,
    output_dir: str,
    cfg: Mapping[str, Any],
    cfg_path: str,
    learning_rate: float,
    total_steps: int,
    logging_steps: int,
    gradient_accumulation_steps: int,
    num_data_workers: int,
    batch_size: int,
    eval_epochs: float,
    skip_eval: bool,
    no_save: bool,
    eval_steps_override: int | None,
    save_steps_override: int | None,
    eval_gen: Mapping[str, Any] | None,
    resume_from_checkpoint: bool,
    min_eval_metric_after_epoch: Mapping[int, float] | None,
    seed: int,
    data: str,
    val_data: str | None,
    val_data_split: str,
    debug: bool,
    gradient_checkpointing: bool = False,
    logits_to_keep: int | None = None,
) -> Result:
    """Data, decoder, evaluation and training of a model that `prepare_*` made, in `output_dir`.

    The other keys of a run config come from `cfg` (`optim`, `weight_decay`, `overwrite`, ...). With
    `skip_eval` what evaluation would need counts for nothing. Raises InputError, also for a model
    from elsewhere.
    """
    origin = ORIGINS.get(model)
    if origin is None:
        raise InputError(
            "model: it was not made by prepare_gla_model_and_tokenizer or "
            "prepare_mamba_model_and_tokenizer, so that its family and its adapter are not known"
        )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    values = {
        **{key: value for key, value in cfg.items() if key not in OF_OLD_CODE},
        "model": origin.model_id,
        "prec": origin.prec,
        "peft": origin.peft,
        "tokenizer": origin.tokenizer_id,
        "learning_rate": float(learning_rate),
        "max_steps": total_steps,
        "logging_steps": logging_steps,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "num_data_workers": num_data_workers,
        "batch_size": batch_size,
        "eval_epochs": eval_epochs,
        "skip_eval": skip_eval,
        "no_save": no_save,
        "eval_steps": eval_steps_override,
        "save_steps": save_steps_override,
        "eval_gen": None if skip_eval or eval_gen is None else dict(eval_gen),
        "resume": resume_from_checkpoint,
        "min_eval_metric_after_epoch": {} if skip_eval else dict(min_eval_metric_after_epoch or {}),
        "seed": seed,
        "data": data,
        "val_data": val_data,
        "val_data_split": val_data_split,
        "debug": debug,
        "gradient_checkpointing": gradient_checkpointing,
        "logits_to_keep": logits_to_keep,
    }
    run_dir = Path(output_dir)
    directories = {k: v for k, v in os.environ.items() if k in DIRECTORIES}
    run_cfg, provenance = resolve_config(
        Document(cfg_path, values, {}), run_dir.name, environment=directories
    )
    prepared = Prepared(model, tokenizer, origin.traits, origin.kernels)
    subject = Subject(origin.adapter, prepared, origin.reason, origin.method)
    return run(run_cfg, provenance, cfg_path, run_dir=run_dir, given=subject)


# ---------------------------------------------------------------- data


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


# ---------------------------------------------------------------- decoding


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
