"""Batched decoding on top of transformers' `generate`: an answer never depends on its batch.

Left padding only: the states of a recurrent model must end on the prompt's last token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from ssm_train.decode_step import decoding_steps
from ssm_train.errors import InputError, near
from ssm_train.kernels.lora_linear import constant_factors
from ssm_train.settings import Settings
from ssm_train.watchdog import beat

DEFAULT_NEW_TOKENS = 128

Autocast = Callable[[], AbstractContextManager[Any]]


class GenerationOptions(Settings):
    """How to decode; names and meanings of transformers' `GenerationConfig`, but for
    `max_length`, which has always been the answer's here."""

    max_length: int | None = Field(default=None, ge=1)
    """Most tokens of the answer, like `max_new_tokens`: the prompt does not count."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of the answer; None, and no `max_length`: 128."""
    min_length: int = Field(default=0, ge=0)
    """Fewest tokens of prompt and answer together."""
    min_new_tokens: int = Field(default=0, ge=0)
    """Fewest tokens of the answer."""
    num_beams: int = Field(default=1, ge=1)
    """Beams of beam search; 1: greedy."""
    length_penalty: float = 1.0
    """Beam search divides a score by length to this power."""
    early_stopping: bool = False
    """End beam search as soon as `num_beams` answers are finished."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    """Length of n-grams that may occur only once; 0: off."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Makes tokens that occurred less likely; 1: off."""
    do_sample: bool = False
    """Draw tokens instead of taking the likeliest."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides logits before drawing."""
    top_k: int = Field(default=0, ge=0)
    """Draw from this many likeliest tokens; 0: all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens of this total probability."""
    mode: str | None = None
    """Kept for old configs: how logits are computed changes no answer."""

    @property
    def most_new_tokens(self) -> int:
        return self.max_new_tokens or self.max_length or DEFAULT_NEW_TOKENS


def read_options(options: Mapping[str, Any]) -> GenerationOptions:
    """`eval_gen` or keyword arguments, checked; InputError names the key and the way out."""
    known = GenerationOptions.model_fields
    for key in options:
        if key not in known:
            raise InputError(
                f"eval_gen: unknown key {key!r}{near(key, known)} (known: {', '.join(known)})"
            )
    drawing = [key for key in ("temperature", "top_k", "top_p") if key in options]
    if drawing and not {"do_sample", "num_beams"} & set(options):
        options = {**options, "do_sample": options.get("top_k") != 1}  # one token: the likeliest
    try:
        read = GenerationOptions(**options)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise InputError(f"eval_gen: {key}: {options[key]!r}: {first['msg']}") from None
    if read.max_length is not None and read.max_new_tokens is not None:
        raise InputError(
            f"eval_gen: max_length {read.max_length} and max_new_tokens {read.max_new_tokens} both "
            "limit the answer; give one"
        )
    if drawing and not read.do_sample and read.top_k != 1:
        raise InputError(f"eval_gen: {drawing[0]} has no effect without do_sample: true")
    return read


@dataclass(frozen=True)
class Decoder:
    """Turns prompts into answers: `decoder(model, prompts) -> answers`, both lists of token ids."""

    options: GenerationOptions
    eos_token_id: int
    pad_token_id: int
    batch_size: int
    autocast: Autocast
    steps: Literal["auto", "static", "eager"] = "auto"
    """How the tokens of an answer are computed (`decode_step`): "auto", by a CUDA graph on a GPU
    and as transformers does elsewhere; "static", as recorded but without a graph; "eager", as
    transformers does. Answers are the same, with beams and every other option too."""

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """InputError for an empty prompt."""
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise InputError(f"prompt {i} is empty; give at least one token")

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        between: Callable[[], None] = beat,
    ) -> list[list[int]]:
        """Answers in the order of `prompts`, without end-of-text and what follows it. `between` is
        called before every batch, and may raise."""
        self.check_prompts(prompts)
        answers: list[list[int]] = [[] for _ in prompts]
        with (
            self.stepping(model, min(self.batch_size, len(prompts))),
            constant_factors(),
            evaluation_mode(model),
            self.autocast(),
            quiet_transformers(),
        ):
            for batch in self.batches(prompts):
                between()
                decoded = self.decode_batch(model, [prompts[i] for i in batch])
                for i, answer in zip(batch, decoded, strict=True):
                    answers[i] = answer
        return answers

    def stepping(self, model: nn.Module, prompts: int) -> AbstractContextManager[None]:
        """For batches of at most so many prompts."""
        record = self.steps == "auto" and next(model.parameters()).is_cuda
        if record or self.steps == "static":
            return decoding_steps(language_model(model), prompts * self.options.num_beams, record)
        return nullcontext()

    def batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of prompts of similar lengths, longest first.

        Some options look at the prompt, and transformers at the padding too (for
        `repetition_penalty` older ones): with them, a batch has prompts of one length only.
        """
        options = self.options
        penalty = options.repetition_penalty != 1
        one_length = options.min_length or options.no_repeat_ngram_size or penalty
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        groups = groupby(order, key=lambda i: len(prompts[i]) if one_length else 0)
        for _, group in groups:
            members = list(group)
            for start in range(0, len(members), self.batch_size):
                yield members[start : start + self.batch_size]

    def decode_batch(self, model: nn.Module, prompts: list[Sequence[int]]) -> list[list[int]]:
        device = next(model.parameters()).device
        ids, mask = pad_left(prompts, self.pad_token_id)
        generated = unwrap(model).generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=self.configure(len(prompts[0])),
        )
        answers = generated[:, ids.shape[1] :].tolist()
        return [cut(answer, self.eos_token_id) for answer in answers]

    def configure(self, prompt_length: int) -> Any:
        """transformers' configuration of one batch; explicit, so that the model's own is not."""
        from transformers import GenerationConfig

        options = self.options
        fewest = max(options.min_new_tokens, options.min_length - prompt_length)
        sampling = (
            {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
            if options.do_sample
            else {}
        )
        return GenerationConfig(
            max_new_tokens=options.most_new_tokens,
            min_new_tokens=fewest if fewest > 0 else None,
            num_beams=options.num_beams,
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
            repetition_penalty=options.repetition_penalty,
            do_sample=options.do_sample,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.pad_token_id,
            use_cache=True,
            **sampling,
        )


def create_decoder(
    tokenizer: Any, *, batch_size: int = 16, autocast: Autocast = nullcontext, **eval_gen: Any
) -> Decoder:
    """A decoder with the options of `eval_gen` (see GenerationOptions).

    `autocast` makes the context of the forward passes. Raises InputError for an unknown or
    impossible option and for a tokenizer without an end-of-text token.
    """
    options = read_options(eval_gen)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the tokenizer has no end-of-text token, so that no answer would end")
    pad = tokenizer.pad_token_id
    return Decoder(options, eos, eos if pad is None else pad, batch_size, autocast)


def generate_text(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    autocast: Autocast = nullcontext,
    **options: Any,
) -> list[str]:
    """Answers to `prompts`; `options` as in `create_decoder`. No special tokens are added."""
    decoder = create_decoder(tokenizer, autocast=autocast, **options)
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in decoder(model, ids)]


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] int64 and attention mask [B, T] int64."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def cut(answer: list[int], eos: int) -> list[int]:
    return answer[: answer.index(eos)] if eos in answer else answer


def unwrap(model: nn.Module) -> Any:
    """The model inside DistributedDataParallel, which has no `generate`."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module
    return model


def language_model(model: nn.Module) -> nn.Module:
    """The model whose forward `generate` calls, inside PEFT's too."""
    inner: Any = unwrap(model)
    base: nn.Module = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return base


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; every module's mode comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Only errors of transformers reach the terminal."""
    import warnings

    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
