"""Chat messages by a chat template; the loss is on the assistant's turns only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ssm_train.data.tasks.task import Record, Rendered, Segment
from ssm_train.data.tasks.text import GENERATION_METRICS, check_metrics
from ssm_train.errors import InputError
from ssm_train.scores import compute_metrics
from ssm_train.settings import Settings

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

PLAIN = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif -%}
"""
"""For tokenizers without a template: `<|user|>`, a line, the text; end-of-text after answers."""

NO_DATE = """\
{% macro strftime_now(format) %}{{ raise_exception("they would hold today's date (strftime_now), \
and be other data tomorrow; set task.variables to the date where the template reads one \
({date_string: 26 Jul 2024}), or task.template to one with a fixed date") }}{% endmacro %}
"""
"""Stands before every template: in place of the function that gives the time."""


class ChatTask(Settings):
    """A conversation; `bind_template` puts in what it takes from the tokenizer."""

    type: Literal["chat"] = "chat"
    field: str = "messages"
    """Field with the messages: a list of {role, content}, or of ShareGPT's {from, value}."""
    template: str | None = None
    """Chat template: "plain" (ours), the path of a .jinja file, or Jinja text; None: the
    tokenizer's own."""
    variables: dict[str, Any] = {}
    """What the template reads besides the messages; the tokenizer's special tokens come along."""
    reserved: list[str] = []
    """Texts that no message may hold: the tokenizer's special tokens come along."""
    metrics: list[str] = Field(default=["rougeL", "exact_match"], min_length=1)
    """Of exact_match, bleu, meteor, rouge1, rouge2, rougeL, for the last answer of a chat."""

    _check_metrics = check_metrics(GENERATION_METRICS)

    def render(self, record: Record, *, training: bool) -> list[Rendered]:
        """One example. Raises InputError without a place: no messages, a bad one, no answer."""
        messages, first = read_messages(record, self.field)
        for message in messages:
            for token in self.reserved:
                if token and token in message["content"]:
                    raise InputError(
                        f"a message of {message['role']} holds {token!r}, which the tokenizer "
                        "reads as a special token; remove it from the text"
                    )
        eos = str(self.variables.get("eos_token", ""))
        segments: list[Segment] = []
        shown = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number < first:
                continue
            before = self.fill(messages[:number], answering=True)
            after = self.fill(messages[: number + 1], answering=False)
            if not (before.startswith(shown) and after.startswith(before)):
                raise InputError(
                    "the chat template changes what stands before an answer when the answer is "
                    "added, so that it cannot be told which text is the assistant's; set "
                    "task.template to another one"
                )
            answer = after[len(before) :]
            if eos and eos in answer:  # what follows the end is the next turn's
                answer = answer[: answer.rindex(eos) + len(eos)]
            segments.append(Segment(before[len(shown) :], special=True))
            segments.append(Segment(answer, learnt=True, special=True))
            shown = before + answer
        if not segments:
            raise InputError(f"no message of the assistant in {self.field!r}, so nothing to learn")
        last = [m["content"] for m in messages if m["role"] == "assistant"][-1].strip()
        turn_end = find_turn_end(segments[-1].text.removesuffix(eos), last)
        ends = not (eos and segments[-1].text.endswith(eos))
        return [Rendered(tuple(segments), (last,), turn_end, ends)]

    def fill(self, messages: Sequence[Mapping[str, str]], *, answering: bool) -> str:
        """The template's text. Raises InputError for what the template refuses."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=NO_DATE + (template_text(self.template) or PLAIN),
                add_generation_prompt=answering,
                **self.variables,
            )
        # A template is a program, which may fail in any of these ways.
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError,
                ValueError, RecursionError) as error:  # fmt: skip
            raise InputError(f"the chat template refuses the messages: {error}") from None
        return str(rendered[0][0])

    def score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        contexts: Sequence[str],
    ) -> dict[str, float]:
        """Metrics of the last answers, up to where the template ends a turn (`contexts`)."""
        answers = [
            answer.partition(turn_end)[0] if turn_end else answer
            for answer, turn_end in zip(predictions, contexts, strict=True)
        ]
        return compute_metrics(self.metrics, answers, references)


def find_turn_end(answer: str, content: str) -> str:
    """What the template writes behind a message to end its turn, without spaces around it."""
    return answer.rpartition(content)[2].strip() if content and content in answer else ""


def bind_template(task: ChatTask, tokenizer: Any) -> ChatTask:
    """The task with its template's text and the tokenizer's special tokens.

    Raises InputError when neither the task nor the tokenizer has a template.
    """
    template = template_text(task.template) or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        raise InputError(
            f"task: tokenizer {tokenizer.name_or_path!r} has no chat template; set `task: "
            "{type: chat, template: plain}` or the path of a .jinja file"
        )
    named = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    return task.model_copy(
        update={
            "template": template,
            "variables": named | task.variables,
            "reserved": sorted({*task.reserved, *tokenizer.all_special_tokens, *added}),
        }
    )


def template_text(template: str | None) -> str | None:
    """The Jinja text that `task.template` stands for. Raises InputError for a missing file."""
    if template is None or "{" in template:
        return template
    if template == "plain":
        return PLAIN
    path = Path(template)
    if not path.is_file():
        raise InputError(
            f"task.template: {template} is no file; give `plain`, the path of a .jinja file, or "
            "Jinja text"
        )
    return path.read_text(encoding="utf-8")


def read_messages(record: Record, field: str) -> tuple[list[dict[str, str]], int]:
    """A record's messages as {role, content}, and the number of the first that may be learnt.

    From `field`, or from `prompt` and `completion` as lists of messages, where only the
    completion is learnt. Raises InputError without a place.
    """
    if field not in record and {"prompt", "completion"} <= set(record):
        parts = [read_turns(record[name], name) for name in ("prompt", "completion")]
        return parts[0] + parts[1], len(parts[0])
    if field not in record:
        raise InputError(f"no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
    return read_turns(record[field], field), 0


def read_turns(turns: Any, field: str) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise InputError(f"field {field!r} is {str(turns)[:40]!r}; expected a list of messages")
    messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"message {number} of {field!r}"
        if not isinstance(turn, Mapping):
            raise InputError(f"{where} is {str(turn)[:40]!r}; expected {{role, content}}")
        role = turn.get("role", turn.get("from"))
        role = SHAREGPT_ROLES.get(str(role), role)
        content = turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise InputError(f"{where} has role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"{where} has content {str(content)[:40]!r}; expected text")
        messages.append({"role": str(role), "content": content})
    return messages
