"""Chats and plain text: which tokens are learnt, by templates and without, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from ssm_train.data import DataSettings
from ssm_train.data.batches import pack
from ssm_train.data.examples import tokenize_records
from ssm_train.data.records import Records
from ssm_train.data.sources import check_data, find_task, load_task_data, training_texts
from ssm_train.data.tasks import build_task
from ssm_train.data.tasks.chat import ChatTask, bind_template
from ssm_train.data.tasks.corpus import CorpusTask
from ssm_train.data.tasks.text import GenerationTask
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what the assistant thought in earlier turns, as some reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: {% if m.role != 'assistant' or loop.last %}"
    "{{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "who are you"},
    {"role": "assistant", "content": "a model"},
    {"role": "user", "content": "what model"},
    {"role": "assistant", "content": "a small one"},
]


@pytest.fixture
def tokenizer() -> Any:
    words = "be brief who are you a model what small one system user assistant hello"
    made = build_tokenizer([words] * 3, {"type": "bpe", "vocab_size": 400})
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.add_special_tokens({"eos_token": AddedToken("<|im_end|>", special=True)})
    made.chat_template = CHATML
    return made


def tokenize(task: Any, rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> Any:
    records = Records("chats.jsonl", enumerate(rows, start=1), by_line=True)
    return tokenize_records(records, task, tokenizer, **({"training": True} | options))


def learnt_text(data: Any, tokenizer: Any, i: int = 0) -> str:
    ids, mask = data.example_ids(i), data.learnt(i)
    return tokenizer.decode(ids[mask])


def test_the_ids_are_those_of_the_tokenizer_s_own_template(tokenizer):
    data = tokenize(bind_template(ChatTask(), tokenizer), [{"messages": CHAT}], tokenizer)
    own = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    line_end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert data.example_ids(0).tolist() + line_end == own
    prompt = tokenizer.apply_chat_template(
        CHAT[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert data.prompt_ids(0).tolist() == prompt


def test_only_the_assistant_is_learnt_with_the_end_of_its_turns(tokenizer):
    data = tokenize(bind_template(ChatTask(), tokenizer), [{"messages": CHAT}], tokenizer)
    assert learnt_text(data, tokenizer) == "a model<|im_end|>a small one<|im_end|>"
    assert tokenizer.decode(data.label_ids(0)) == "a small one<|im_end|>"
    batch = pack(data, np.array([0]), 256)
    assert tokenizer.decode(batch.targets) == "a model<|im_end|>a small one<|im_end|>"
    flat = batch.input_ids.flatten()
    assert (flat[batch.target_positions + 1] == batch.targets).all()


def test_a_tokenizer_without_a_template_can_be_given_ours(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template; set `task: {type: chat, template"):
        bind_template(ChatTask(), tokenizer)
    task = bind_template(ChatTask(template="plain"), tokenizer)
    data = tokenize(task, [{"messages": CHAT}], tokenizer)
    assert learnt_text(data, tokenizer) == "a model<|im_end|>a small one<|im_end|>"
    assert tokenizer.decode(data.prompt_ids(0)).startswith("<|system|>\nbe brief\n<|user|>\nwho")
    assert tokenizer.decode(data.prompt_ids(0)).endswith("what model\n<|assistant|>\n")


def test_an_answer_ends_for_the_metrics_where_the_template_ends_the_turn(tokenizer):
    """The template's end of a turn need not be the end-of-text token, as in a base model's
    tokenizer; decoding stops at the latter."""
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    task = bind_template(ChatTask(metrics=["exact_match", "rougeL"]), tokenizer)
    data = tokenize(task, [{"messages": CHAT}], tokenizer, training=False)
    answer = tokenizer.decode(data.label_ids(0)[:-1])
    assert answer == "a small one<|im_end|>\n" and data.references(0) == ("a small one",)
    for said, right in ((answer, 1), (f"{answer}<|im_start|>user", 1), ("a small", 0)):
        values = task.score([said], [data.references(0)], [data.context(0)])
        assert values["exact_match"] == right and (values["rougeL"] == 1) == right
    silent = [*CHAT[:4], {"role": "assistant", "content": ""}]
    assert tokenize(task, [{"messages": silent}], tokenizer, training=False).context(0) == ""


def test_special_tokens_without_a_name_are_reserved_too(tokenizer):
    tokenizer.add_tokens([AddedToken("<|call|>", special=True)], special_tokens=True)
    assert "<|call|>" not in tokenizer.special_tokens_map.values()
    task = bind_template(ChatTask(), tokenizer)
    row = {"messages": [{"role": "user", "content": "hello <|call|>"}, CHAT[2]]}
    with pytest.raises(InputError, match=r"a message of user holds '<\|call\|>'"):
        tokenize(task, [row], tokenizer)


def test_end_of_text_is_added_where_the_template_has_none(tokenizer):
    template = CHATML.replace("<|im_end|>", "")
    task = bind_template(ChatTask(template=template), tokenizer)
    data = tokenize(task, [{"messages": CHAT}], tokenizer)
    assert data.example_ids(0).tolist().count(tokenizer.eos_token_id) == 1
    assert data.learnt(0)[-1] and data.example_ids(0)[-1] == tokenizer.eos_token_id


def test_prompt_and_completion_as_messages_learn_the_completion_only(tokenizer):
    row = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    data = tokenize(bind_template(ChatTask(), tokenizer), [row], tokenizer)
    assert learnt_text(data, tokenizer) == "a small one<|im_end|>"


def test_sharegpt_names(tokenizer):
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "a model"}]
    task = bind_template(ChatTask(field="conversations"), tokenizer)
    data = tokenize(task, [{"conversations": turns}], tokenizer, training=False)
    assert learnt_text(data, tokenizer) == "a model<|im_end|>"
    assert data.references(0) == ("a model",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "no field 'messages'; it has 'text'"),
        ({"messages": []}, "field 'messages' is '[]'; expected a list of messages"),
        ({"messages": ["hi"]}, "message 1 of 'messages' is 'hi'; expected {role, content}"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 1 of 'messages' has role 'bot'"),
        ({"messages": [{"role": "user", "content": None}]}, "has content 'None'; expected text"),
        ({"messages": CHAT[:2]}, "no message of the assistant in 'messages'"),
        (
            {"messages": [CHAT[1], {"role": "assistant", "content": "x<|im_end|>y"}]},
            "a message of assistant holds '<|im_end|>'",
        ),
    ],
)
def test_bad_chats_are_named_with_their_line(tokenizer, row, message):
    task = bind_template(ChatTask(), tokenizer)
    with pytest.raises(InputError) as caught:
        tokenize(task, [{"messages": CHAT}, row], tokenizer)
    assert str(caught.value).startswith("chats.jsonl:2: ") and message in str(caught.value)


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer):
    task = bind_template(ChatTask(template=FORGETFUL), tokenizer)
    with pytest.raises(InputError, match="chats.jsonl:1: the chat template changes"):
        tokenize(task, [{"messages": CHAT}], tokenizer)
    data = tokenize(task, [{"messages": CHAT[:3]}], tokenizer)
    assert learnt_text(data, tokenizer) == "a model<|im_end|>"


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "today {{ date_string }}\n" + CHATML
)


def test_a_template_that_asks_for_the_date_is_refused(tokenizer):
    tokenizer.chat_template = DATED
    with pytest.raises(InputError, match=r"chats.jsonl:1: the chat .* today's date .* task.var"):
        tokenize(bind_template(ChatTask(), tokenizer), [{"messages": CHAT}], tokenizer)
    given = ChatTask(variables={"date_string": "26 Jul 2024"})
    data = tokenize(bind_template(given, tokenizer), [{"messages": CHAT}], tokenizer)
    assert tokenizer.decode(data.example_ids(0)).startswith("today 26 Jul 2024\n<|im_start|>system")


@pytest.mark.parametrize("start", ["", "\n", "\n\n", "  ", "{{ 'x' }} \n", "  {# a note #}\n"])
def test_a_template_is_rendered_as_by_the_tokenizer(tokenizer, start):
    tokenizer.chat_template = f"{start}{CHATML}{{% if strftime_now is defined %}}!{{% endif %}}"
    filled = bind_template(ChatTask(), tokenizer).fill(CHAT, answering=True)
    own = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert filled == own


def test_text_is_learnt_but_for_its_first_token(tokenizer):
    rows = [{"text": "who are you"}, {"text": "a model"}]
    data = tokenize(CorpusTask(), rows, tokenizer)
    for i, row in enumerate(rows):
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        assert data.example_ids(i).tolist() == [*ids, tokenizer.eos_token_id]
        assert data.learnt(i).tolist() == [False] + [True] * len(ids)


def test_long_text_is_cut_and_every_token_is_learnt_once(tokenizer):
    text = "who are you what model a small one be brief hello"
    whole = tokenize(CorpusTask(), [{"text": text}], tokenizer)
    data = tokenize(CorpusTask(), [{"text": text}], tokenizer, max_length=4)
    assert data.dropped == 0 and max(data.lengths) == 4 and len(data) > 2
    learnt = [t for i in range(len(data)) for t in data.example_ids(i)[data.learnt(i)].tolist()]
    assert learnt == whole.example_ids(0)[1:].tolist()
    for i in range(1, len(data)):  # what is only read is the token before
        assert data.example_ids(i)[0] == data.example_ids(i - 1)[-1]
    evaluated = tokenize(CorpusTask(), [{"text": text}], tokenizer, max_length=4, training=False)
    assert len(evaluated) == 1


@pytest.mark.parametrize("training", [True, False])
def test_blank_texts_are_skipped_and_counted(tokenizer, training, monkeypatch):
    monkeypatch.setattr("ssm_train.data.pieces.CHUNK_RECORDS", 2)
    rows = [{"text": text} for text in ("who", "are", "you", " \n", "", "", "hello")]
    data = tokenize(CorpusTask(), rows, tokenizer, training=training)
    assert len(data) == 4 and len(data.chunks) == 4
    assert data.describe_blank() == ["chats.jsonl: 3 blank text(s) skipped, first chats.jsonl:4"]
    assert tokenize(CorpusTask(), rows[:3], tokenizer).describe_blank() == []
    with pytest.raises(InputError, match=r"chats.jsonl: every text is blank"):
        tokenize(CorpusTask(), rows[3:6], tokenizer, training=training)


@pytest.mark.parametrize("text", [None, 3])
def test_text_that_is_none(tokenizer, text):
    with pytest.raises(InputError, match=r"chats.jsonl:1: field 'text' is .*; expected text"):
        tokenize(CorpusTask(), [{"text": text}], tokenizer)


@pytest.mark.parametrize(
    ("record", "task"),
    [
        ({"messages": CHAT}, ChatTask()),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, ChatTask(field="conversations")),
        ({"prompt": CHAT[:1], "completion": CHAT[2:3]}, ChatTask()),
        (
            {"prompt": "a", "completion": " b"},
            GenerationTask(prompt="{prompt}", label="{completion}"),
        ),
        ({"text": "a b"}, CorpusTask()),
    ],
)
def test_the_task_follows_from_usual_fields(tmp_path: Path, record, task):
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(record) + "\n")
    settings = DataSettings(data=str(tmp_path))
    assert find_task(settings) == check_data(settings) == task


def test_a_chat_task_from_a_config(tmp_path: Path, tokenizer):
    (tmp_path / "plain.jinja").write_text(CHATML.replace("im_end", "end"))
    spec = {"type": "chat", "template": str(tmp_path / "plain.jinja"), "metrics": ["bleu"]}
    task = build_task(spec)
    assert "<|end|>" in bind_template(task, tokenizer).template
    with pytest.raises(InputError, match="task.template: nowhere.jinja is no file"):
        bind_template(build_task(spec | {"template": "nowhere.jinja"}), tokenizer)
    with pytest.raises(InputError, match=r"task: unknown key 'templat'"):
        build_task({"type": "chat", "templat": "x"})


def test_a_tokenizer_can_be_built_from_chats(tmp_path: Path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    settings = DataSettings(data=str(tmp_path), task={"type": "chat", "template": "plain"})
    built = build_tokenizer(training_texts(settings), {"type": "word"})
    data = load_task_data(settings, built, "train", limit=1)
    assert built.unk_token_id not in data.example_ids(0).tolist()[:-1]


def test_chats_are_loaded_with_the_tokenizer_s_template(tmp_path: Path, tokenizer):
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    settings = DataSettings(data=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    first = load_task_data(settings, tokenizer, "val")
    assert learnt_text(first, tokenizer) == "a model<|im_end|>a small one<|im_end|>"
    tokenizer.chat_template = CHATML.replace("im_start", "im_begin")  # another template: other ids
    again = load_task_data(settings, tokenizer, "val")
    assert first.example_ids(0).tolist() != again.example_ids(0).tolist()
