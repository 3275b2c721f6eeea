"""Tokenization: parts apart, label spans, what is dropped or refused, here or in processes."""

import multiprocessing
import subprocess
import sys
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssm_train.data.examples import find_label_tokens, tokenize_records
from ssm_train.data.records import Records
from ssm_train.data.tasks import build_task
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError

COPY = build_task({"type": "generation", "prompt": "say {a}", "label": "{b}"})
MOOD = build_task(
    {
        "type": "classification",
        "prompt": "{text} :",
        "label_field": "y",
        "labels": {0: "bad", 1: "good"},
    }
)


def records(rows: list[dict]) -> Records:
    return Records("some.jsonl", enumerate(rows, start=1), by_line=True)


def rows(count: int) -> list[dict]:
    return [{"a": "x " * (i % 5 + 1), "b": "y " * (i % 3 + 1) + str(i)} for i in range(count)]


@pytest.fixture(scope="module")
def words():
    numbers = " ".join(map(str, range(60)))
    return build_tokenizer([f"say x y z bad good : {numbers}"], {"type": "word"})


@pytest.fixture(scope="module")
def pieces():
    spaced = "x ga ge gi go gu ba be bi bo bu"  # so that " g" and " b" are merged first
    return build_tokenizer(["say hello hello", "x good bad", spaced] * 9, {"type": "bpe"})


def test_prompt_and_label_are_tokenized_apart(pieces):
    """In one piece "hel" + "lo" would be one token; apart, no merge crosses the boundary."""
    task = build_task({"type": "generation", "prompt": "say {a}", "label": "{b}"})
    assert len(pieces.tokenize(" hello")) == 1
    data = tokenize_records(records([{"a": "hel", "b": "lo"}]), task, pieces, training=True)
    eos = pieces.eos_token_id
    assert data.prompt_ids(0).tolist() == pieces("say hel")["input_ids"]
    assert data.label_ids(0).tolist() == [*pieces("lo")["input_ids"], eos]
    assert data.example_ids(0).tolist() == [*data.prompt_ids(0), *data.label_ids(0)]


def test_flat_arrays_hold_every_example(words):
    many = rows(50)
    data = tokenize_records(records(many), COPY, words, training=False)
    assert len(data) == 50 and data.example_ids(7).dtype == np.int32 and data.dropped == 0
    for i, row in enumerate(many):
        assert words.decode(data.prompt_ids(i)).split() == ["say", *row["a"].split()]
        assert words.decode(data.label_ids(i)).split() == [*row["b"].split(), "<eos>"]
    assert data.lengths.tolist() == [len(data.example_ids(i)) for i in range(50)]
    assert data.references(4) == (many[4]["b"],)


def test_special_tokens_in_the_text_are_text(pieces):
    row = {"a": "<eos>", "b": "<eos><pad>"}
    data = tokenize_records(records([row]), COPY, pieces, training=True)
    special = {pieces.eos_token_id, pieces.pad_token_id}
    assert not special & set(data.prompt_ids(0).tolist())
    assert [i for i in data.label_ids(0).tolist() if i in special] == [pieces.eos_token_id]
    assert pieces.decode(data.label_ids(0)[:-1]) == "<eos><pad>"


def test_classification_labels_are_one_token(words):
    rows = [{"text": "x x", "y": 1}, {"text": "y", "y": "0"}]
    data = tokenize_records(records(rows), MOOD, words, training=True)
    good, bad = words.convert_tokens_to_ids(["good", "bad"])
    assert data.class_ids == (bad, good)
    assert [data.label_ids(i).tolist() for i in range(2)] == [[good], [bad]]


@pytest.mark.parametrize("written", ["good", " good"])
def test_label_words_find_the_spelling_that_is_one_token(pieces, written):
    """Byte-level BPE learnt " good" with its space; "good" alone is several tokens."""
    assert len(pieces.tokenize(" good")) == 1 < len(pieces.tokenize("good"))
    task = MOOD.model_copy(update={"labels": {0: written.replace("good", "bad"), 1: written}})
    tokens = find_label_tokens(task, pieces)
    assert tokens[written] == pieces.convert_tokens_to_ids("Ġgood")


def test_label_words_after_a_piece_of_white_space():
    """Llama's and Mistral's tokenizers, GLA's among them, write "0" as "▁", "0"."""
    pieces = {"<unk>": 0, "<eos>": 1, "▁": 2, "0": 3, "1": 4, "▁yes": 5, "▁no": 6, "▁yesno": 7}
    backend = Tokenizer(
        models.Unigram([(piece, -float(i)) for piece, i in pieces.items()], unk_id=0)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    llama = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    assert llama("0")["input_ids"] == [2, 3]
    digits = MOOD.model_copy(update={"labels": {0: "0", 1: "1"}})
    assert find_label_tokens(digits, llama) == {"0": 3, "1": 4}
    words = MOOD.model_copy(update={"labels": {0: " no", 1: " yes"}})
    assert set(find_label_tokens(words, llama).values()) == {5, 6}
    with pytest.raises(InputError, match="not one token of its own"):
        find_label_tokens(MOOD.model_copy(update={"labels": {0: "10", 1: "01"}}), llama)


def test_label_words_that_are_not_one_token(words, pieces):
    task = MOOD.model_copy(update={"labels": {0: "good", 1: "fantabulous"}})
    with pytest.raises(InputError, match=r"task.labels: 'fantabulous' .*\['<unk>'\]"):
        find_label_tokens(task, words)
    with pytest.raises(InputError, match=r"'fantabulous' is not one token .*\['f', 'a', 'n'"):
        find_label_tokens(task, pieces)
    with pytest.raises(InputError, match="task.labels"):
        find_label_tokens(MOOD.model_copy(update={"labels": {0: "x", 1: " x"}}), words)


def test_too_long_is_dropped_in_training_and_counted(words):
    many = rows(30)
    whole = tokenize_records(records(many), COPY, words, training=True)
    data = tokenize_records(records(many), COPY, words, training=True, max_length=7)
    kept = [i for i in range(30) if whole.lengths[i] <= 7]
    assert 0 < len(kept) < 30 and data.dropped == 30 - len(kept)
    assert [data.example_ids(j).tolist() for j in range(len(data))] == [
        whole.example_ids(i).tolist() for i in kept
    ]
    evaluation = tokenize_records(records(many), COPY, words, training=False, max_length=7)
    assert len(evaluation) == 30 and evaluation.dropped == 0
    with pytest.raises(
        InputError, match="all 30 examples are longer than 4 tokens; raise max_length"
    ):
        tokenize_records(records(many), COPY, words, training=True, max_length=4)


def test_limit_counts_records(words):
    task = COPY.model_copy(update={"references": "each"})
    both = [{"a": "x", "b": ["y", "y z"]}] * 5
    assert len(tokenize_records(records(both), task, words, training=True, limit=2)) == 4
    assert len(tokenize_records(records(both), task, words, training=False, limit=2)) == 2


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (COPY, [], "some.jsonl holds no records"),
        (COPY, [{"a": "x", "b": "y"}, {"a": "x"}], "some.jsonl:2: no field 'b'"),
        (COPY, [{"a": "x", "b": "y"}, {"a": "x", "b": None}], "some.jsonl:2: field 'b' is"),
        (MOOD, [{"text": "x", "y": 7}], "some.jsonl:1: label 7 in field 'y'; known: 0, 1"),
        (
            build_task({"type": "generation", "prompt": "{a}", "label": "{a}"}),
            [{"a": "x"}, {"a": ""}],
            "some.jsonl:2: the label '{a}' is empty",
        ),
        (
            build_task({"type": "generation", "prompt": "{a}", "label": "{b}"}),
            [{"a": " ", "b": "x"}],
            "some.jsonl:1: the prompt has no tokens",
        ),
    ],
)
def test_bad_records_are_named_with_their_line(words, task, rows, message):
    with pytest.raises(InputError) as caught:
        tokenize_records(records(rows), task, words, training=True)
    assert message in str(caught.value)


def test_a_tokenizer_without_end_of_text_is_refused():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "x": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(InputError, match="no end-of-text token"):
        tokenize_records(records(rows(1)), COPY, tokenizer, training=True)


def test_without_a_pad_token_padding_is_end_of_text(words):
    tokenizer = build_tokenizer(["say x y"], {"type": "word"})
    tokenizer.pad_token = None
    data = tokenize_records(records(rows(1)), COPY, tokenizer, training=True)
    assert data.pad_id == data.eos_id == tokenizer.eos_token_id


def test_what_prompts_share_is_tokenized_once(words):
    task = build_task({"type": "generation", "prompt": ["say", " {a}", " :"], "label": "{b}"})
    texts: list[str] = []

    class Counting:
        """Stands before the tokenizer and notes what it is given."""

        def __getattr__(self, name):
            return getattr(words, name)

        def __call__(self, given, **options):
            texts.extend(given)
            return words(given, **options)

    data = tokenize_records(records(rows(30)), task, Counting(), training=True)
    assert len(data) == 30 and texts.count("say") == texts.count(" :") == 1
    assert len(texts) == len(set(texts)) == 2 + 5 + 30
    assert words.decode(data.example_ids(3)).split() == ["say", *"xxxx", ":", "y", "3", "<eos>"]


def test_chunks_end_where_there_is_much_text(words, monkeypatch):
    """However long documents are, no more than some of them are in memory."""
    whole = tokenize_records(records(rows(30)), COPY, words, training=True)
    monkeypatch.setattr("ssm_train.data.pieces.CHUNK_CHARACTERS", 40)
    data = tokenize_records(records(rows(30)), COPY, words, training=True)
    assert len(whole.chunks) == 1 and len(data.chunks) > 5
    assert data.lengths.tolist() == whole.lengths.tolist()
    assert [data.example_ids(i).tolist() for i in range(30)] == [
        whole.example_ids(i).tolist() for i in range(30)
    ]


def test_a_chunk_of_which_all_is_dropped(words, monkeypatch):
    monkeypatch.setattr("ssm_train.data.pieces.CHUNK_RECORDS", 5)
    long, short = {"a": "x " * 9, "b": "y"}, {"a": "x", "b": "y"}
    many = [*[short] * 5, *[long] * 5, *[short] * 2, *[long] * 5]
    data = tokenize_records(records(many), COPY, words, training=True, max_length=5)
    assert [len(chunk) for chunk in data.chunks] == [5, 0, 2, 0] and data.dropped == 10
    expected = data.example_ids(0).tolist()
    assert [data.example_ids(i).tolist() for i in range(7)] == [expected] * 7


def test_processes_give_what_one_process_gives(words, monkeypatch):
    many = rows(47)
    alone = tokenize_records(records(many), COPY, words, training=False)
    monkeypatch.setattr("ssm_train.data.pieces.CHUNK_RECORDS", 5)
    monkeypatch.setattr("ssm_train.data.pieces.PARALLEL_AFTER_SECONDS", -1.0)
    done: list[int] = []
    shared = tokenize_records(
        records(many), COPY, words, training=False, num_workers=2, progress=done.append
    )
    assert len(shared.chunks) == 10 and len(alone.chunks) == 1
    for i in range(47):
        assert shared.example_ids(i).tolist() == alone.example_ids(i).tolist()
        assert shared.learnt(i).tolist() == alone.learnt(i).tolist()
        assert shared.references(i) == alone.references(i)
    assert shared.prompt_lengths.tolist() == alone.prompt_lengths.tolist()
    assert done == [*range(5, 46, 5), 47]


ALONE = """
import multiprocessing, sys, time
from ssm_train.data import DataSettings, examples, pieces, sources
from ssm_train.data.tasks import build_task
from ssm_train.data.vocabulary import build_tokenizer

def look(done):
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    pieces.PARALLEL_AFTER_SECONDS, pieces.CHUNK_RECORDS = -1.0, 5
    task = build_task({"type": "generation", "prompt": "{a}", "label": "{a}"})
    source = sources.find_source(DataSettings(data=sys.argv[1]), "train")
    words = build_tokenizer(["w1"], {"type": "word"})
    examples.tokenize_records(
        source.open(), task, words, training=True, num_workers=2, progress=look
    )
"""


def test_processes_end_with_the_one_that_started_them(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"a": "w1"}\n' * 50)
    (tmp_path / "alone.py").write_text(ALONE)
    command = [sys.executable, str(tmp_path / "alone.py"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    until = time.monotonic() + 60
    while any(is_living(pid) for pid in workers):
        assert time.monotonic() < until, "left behind"
        time.sleep(0.1)


def is_living(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


def test_a_process_that_is_killed_while_it_tokenizes_is_said(words, monkeypatch):
    """As by a system that has no memory left; nothing waits for it for ever."""
    monkeypatch.setattr("ssm_train.data.pieces.PARALLEL_AFTER_SECONDS", 0)
    monkeypatch.setattr("ssm_train.data.pieces.CHUNK_RECORDS", 50)

    def kill(done: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(InputError, match="some.jsonl: a process that tokenizes was killed, mostly"):
        tokenize_records(
            records(rows(5000)), COPY, words, training=False, num_workers=2, progress=kill
        )
