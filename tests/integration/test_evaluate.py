"""Decoding and evaluation with transformers' own Mamba: one by one, in batches, over ranks."""

import copy
import json
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from ssm_train.adapters.base import Batch, LossSum
from ssm_train.data.tasks.text import ClassificationTask, GenerationTask
from ssm_train.errors import InputError
from ssm_train.evaluate import (
    EvalSettings,
    Row,
    describe_choices,
    evaluate_classification,
    evaluate_generation,
    evaluate_loss,
    score_once,
    slice_of_rank,
    write_predictions,
)
from ssm_train.generate import create_decoder, generate_text
from ssm_train.scores import OUT_OF_CLASS

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, 24))]
SIDES = ClassificationTask(
    prompt="{x}", label_field="y", labels={0: "w7", 1: "w9"}, metrics=["accuracy", "f1"]
)
ANSWERS = GenerationTask(prompt="{x}", label="{y}", metrics=["exact_match", "bleu"])
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [4, 4, 20, 21], [16, 17, 18], [3, 22]]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(48)  # some answers end early, greedy and with beams
    config = MambaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        initializer_range=0.6,
        eos_token_id=1,
        pad_token_id=0,
    )
    return MambaForCausalLM(config).eval()


def greedy_by_full_forwards(model, prompt, most):
    """The definition: argmax of the full forward, token after token."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + most:
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == 1:
                break
            ids.append(token)
    return ids[len(prompt) :]


def answer_of_transformers(model, prompt, **options):
    ids = torch.tensor([prompt])
    config = GenerationConfig(eos_token_id=1, pad_token_id=0, **options)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    answer = out[0, len(prompt) :].tolist()
    return answer[: answer.index(1)] if 1 in answer else answer


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_greedy_in_batches_equals_full_forwards_one_by_one(model, tokenizer, batch_size):
    expected = [greedy_by_full_forwards(model, p, 12) for p in PROMPTS]
    # The set is worth something: answers differ, some end early, some are cut.
    assert len({tuple(a) for a in expected}) >= 4
    assert {len(a) == 12 for a in expected} == {True, False}
    decoder = create_decoder(tokenizer, batch_size=batch_size, max_new_tokens=12)
    assert decoder(model, PROMPTS) == expected


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 9}, {"max_length": 10}, {"max_length": 14, "min_length": 9}],
    ids=str,
)
def test_batches_equal_transformers_one_by_one(model, tokenizer, num_beams, options):
    """`max_length` counts the answer here, and prompt and answer in transformers."""
    expected = []
    for prompt in PROMPTS:
        theirs = dict(options)
        if "max_length" in theirs:
            theirs["max_length"] += len(prompt)
        expected.append(answer_of_transformers(model, prompt, num_beams=num_beams, **theirs))
    decoder = create_decoder(tokenizer, num_beams=num_beams, **options)
    assert decoder(model, PROMPTS) == expected
    if "max_length" in options:
        totals = [len(p) + len(a) for p, a in zip(PROMPTS, expected, strict=True)]
        assert max(map(len, expected)) == options["max_length"]
        assert (min(totals) >= 9) == ("min_length" in options)
    if "min_length" in options:
        free = {k: v for k, v in options.items() if k != "min_length"}
        assert expected != create_decoder(tokenizer, num_beams=num_beams, **free)(model, PROMPTS)


@pytest.mark.parametrize("options", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}])
def test_padding_is_no_token_that_occurred(model, tokenizer, options):
    """Where padding is the end of text, an answer beside a longer prompt would end later. For
    repetition_penalty that is so in the oldest transformers that we take, 5.17."""
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    options = options | {"max_new_tokens": 9}
    expected = [answer_of_transformers(model, prompt, **options) for prompt in PROMPTS]
    assert create_decoder(same, **options)(model, PROMPTS) == expected


def log_probability(model, prompt, answer):
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        log_probs = model(ids).logits[0].log_softmax(-1)
    at = range(len(prompt) - 1, ids.shape[1] - 1)
    return sum(float(log_probs[t, ids[0, t + 1]]) for t in at)


def test_beam_search_finds_likelier_answers_than_greedy(model, tokenizer):
    options = {"min_new_tokens": 6, "max_new_tokens": 6}  # equal lengths compare
    greedy = create_decoder(tokenizer, **options)(model, PROMPTS)
    beams = create_decoder(tokenizer, num_beams=8, **options)(model, PROMPTS)
    gains = [
        log_probability(model, p, b) - log_probability(model, p, g)
        for p, g, b in zip(PROMPTS, greedy, beams, strict=True)
    ]
    assert sum(gains) > 0.1 and max(gains) > 0.1


def test_pad_token_equal_to_end_of_text(model, tokenizer):
    expected = create_decoder(tokenizer, max_new_tokens=12)(model, PROMPTS)
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    assert create_decoder(same, max_new_tokens=12)(model, PROMPTS) == expected
    assert any(len(answer) < 12 for answer in expected)


def test_the_models_own_generation_config_changes_nothing(model, tokenizer):
    expected = create_decoder(tokenizer, max_new_tokens=8)(model, PROMPTS)
    own = copy.deepcopy(model)
    own.generation_config = GenerationConfig(
        max_length=3, repetition_penalty=9.0, do_sample=True, num_beams=2, eos_token_id=5
    )
    assert create_decoder(tokenizer, max_new_tokens=8)(own, PROMPTS) == expected


def test_mode_gradients_and_terminal_are_left_alone(model, tokenizer, capfd):
    model = copy.deepcopy(model).train()
    model.backbone.layers[0].eval()  # a module that was frozen in evaluation mode stays so
    modes = [m.training for m in model.modules()]
    entered = []

    class Context:
        def __enter__(self):
            entered.append((torch.is_grad_enabled(), model.training))

        def __exit__(self, *_):
            pass

    decoder = create_decoder(tokenizer, autocast=Context, max_length=10, length_penalty=0.5)
    decoder(model, PROMPTS)
    assert entered == [(False, False)]
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert capfd.readouterr() == ("", "")


def test_old_sampling_options_mean_what_they_did(model, tokenizer):
    """Without beams, top_k or top_p asked for sampling; the one likeliest token is greedy."""
    greedy = create_decoder(tokenizer, max_new_tokens=8)(model, PROMPTS)
    one = create_decoder(tokenizer, max_new_tokens=8, top_k=1, mode="parallel")
    assert not one.options.do_sample and one(model, PROMPTS) == greedy
    drawn = create_decoder(tokenizer, max_new_tokens=8, top_k=20, temperature=5.0)
    torch.manual_seed(0)
    assert drawn.options.do_sample and drawn(model, PROMPTS) != greedy


def test_generate_text(model, tokenizer):
    answers = generate_text(model, tokenizer, ["w5 w6 w7", "w8"], max_new_tokens=5)
    expected = [greedy_by_full_forwards(model, p, 5) for p in PROMPTS[:2]]
    assert answers == [tokenizer.decode(a, skip_special_tokens=True) for a in expected]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_lenght": 9}, ["'max_lenght'", "did you mean 'max_length'"]),
        ({"num_beams": 0}, ["num_beams", "0"]),
        ({"num_beams": "4"}, ["num_beams", "'4'"]),
        ({"max_length": 9, "max_new_tokens": 4}, ["max_length 9", "max_new_tokens 4"]),
        ({"top_k": 5, "num_beams": 2}, ["top_k has no effect without do_sample"]),
        ({"temperature": 0.5, "do_sample": False}, ["temperature has no effect"]),
    ],
    ids=str,
)
def test_bad_options(tokenizer, options, words):
    with pytest.raises(InputError) as error:
        create_decoder(tokenizer, **options)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=words[0].strip("'")):
        EvalSettings(eval_gen=options)  # as early as the config


def test_bad_prompts(model, tokenizer):
    with pytest.raises(InputError, match="prompt 0 is empty"):
        create_decoder(tokenizer)(model, [[]])
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        create_decoder(without)


# ---------------------------------------------------------------- loss and classification


def right_padded(examples, ids):
    """`examples`: (prompt, label) token ids."""
    rows = [[*prompt, *label] for prompt, label in examples]
    width = max(map(len, rows))
    positions, targets = [], []
    for b, (prompt, label) in enumerate(examples):
        for k, token in enumerate(label):
            positions.append(b * width + len(prompt) - 1 + k)
            targets.append(token)
    real = torch.tensor([[t < len(r) for t in range(width)] for r in rows])
    return Batch(
        input_ids=torch.tensor([r + [0] * (width - len(r)) for r in rows]),
        target_positions=torch.tensor(positions),
        targets=torch.tensor(targets),
        sequence_ids=torch.where(real, torch.arange(len(rows))[:, None], -1),
        position_ids=torch.arange(width).expand(len(rows), -1) * real,
        attention_mask=real,
        example_ids=tuple(ids),
        num_tokens=int(real.sum()),
    )


def token_logits(model, batch):
    return model(batch.input_ids).logits.flatten(0, 1)[batch.target_positions]


def token_losses(model, batch):
    loss = F.cross_entropy(token_logits(model, batch), batch.targets, reduction="sum")
    return LossSum(loss, batch.num_targets)


def on_ranks(world_size, work):
    """Runs work(rank, reduce_sum, gather) on threads; returns the results by rank."""
    barrier = threading.Barrier(world_size, timeout=60)
    parts, results = [None] * world_size, [None] * world_size

    def run(rank):
        def exchange(value):
            parts[rank] = value
            barrier.wait()
            everyone = list(parts)
            barrier.wait()
            return everyone

        def gather(rows):
            return [row for part in exchange(rows) for row in part]

        try:
            results[rank] = work(rank, lambda value: sum(exchange(value)), gather)
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


EXAMPLES = [([5, 6, 7], [9, 1]), ([8, 3], [4]), ([9, 9, 10, 11, 12], [13, 14, 15, 1]), ([20], [21])]


def test_loss_is_a_mean_over_tokens_of_all_ranks(model):
    labels = [[*[-100] * len(p), *a] for p, a in EXAMPLES]
    with torch.no_grad():  # transformers' own loss, example by example
        sums = [
            float(model(torch.tensor([[*p, *a]]), labels=torch.tensor([row])).loss) * len(a)
            for (p, a), row in zip(EXAMPLES, labels, strict=True)
        ]
    expected = sum(sums) / 8
    one = evaluate_loss(model, [right_padded(EXAMPLES, range(4))], token_losses, lambda x: x)
    assert one["tokens"] == 8
    assert one["loss"] == pytest.approx(expected, rel=1e-5)
    assert one["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)

    def rank_part(rank, reduce_sum, _):
        split = [[0], [1, 2, 3], []][rank]  # unequal, and a rank without any
        batches = [right_padded([EXAMPLES[i]], [i]) for i in split]
        return evaluate_loss(copy.deepcopy(model), batches, token_losses, reduce_sum)

    for result in on_ranks(3, rank_part):
        assert result["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert result["tokens"] == 8


class Table(nn.Module):
    """A model whose logits at each position are a row of a table."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Embedding.from_pretrained(rows)


def table_logits(model, batch):
    return model.rows(batch.input_ids.flatten()[batch.target_positions])


@pytest.fixture
def table():
    """Token k = 0..5 as the last of a prompt decides; labels are tokens 7 and 9."""
    rows = torch.zeros(6, 10)
    rows[0, 7], rows[0, 9] = 3, 1  # class 0
    rows[1, 7], rows[1, 9] = 1, 3  # class 1
    rows[2, 7], rows[2, 9], rows[2, 4] = 1, 2, 5  # token 4: outside, though 9 beats 7
    rows[3, 7], rows[3, 9] = 2, 1
    rows[4, 7], rows[4, 9] = -1, 4
    rows[5, 7], rows[5, 9], rows[5, 0] = 6, 1, 6  # a tie with another token is not outside
    return Table(rows)


CLASSIFIED = [([6, k], [label]) for k, label in enumerate([7, 9, 9, 9, 9, 7])]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_classification_counts_every_example_once(table, tokenizer, world_size):
    def rank_part(rank, _, gather):
        mine = slice_of_rank(6, rank, world_size)
        if rank == world_size - 1:
            mine = [*mine, 0]  # a rank filled up to equal sizes with an example of another
        mine = sorted(mine, key=lambda i: -i)  # batches come in any order
        batches = [right_padded([CLASSIFIED[i]], [i]) for i in mine]
        return evaluate_classification(
            copy.deepcopy(table), batches, table_logits, [7, 9], SIDES.words, SIDES.score, gather
        )

    for values, choices in on_ranks(world_size, rank_part):
        assert [c.example for c in choices] == list(range(6))
        assert [c.prediction for c in choices] == [0, 1, OUT_OF_CLASS, 0, 1, 0]
        assert [c.target for c in choices] == [0, 1, 1, 1, 1, 0]
        assert [c.choice for c in choices] == [0, 1, 1, 0, 1, 0]
        assert values["accuracy"] == 4 / 6
        assert values["f1"] == pytest.approx(2 * 2 / (2 * 2 + 0 + 2))
        assert values["out_of_cls"] == 1 / 6
        expected = F.cross_entropy(table.rows.weight, torch.tensor([7, 9, 9, 9, 9, 7]))
        assert values["loss"] == pytest.approx(float(expected), rel=1e-6)
        rows = describe_choices(choices, tokenizer, [p for p, _ in CLASSIFIED], [7, 9])
        assert [r.prediction for r in rows[:4]] == ["w7", "w9", "w4", "w7"]
        assert rows[2].labels == ["w9"] and rows[2].label_ids == [[9]]


def test_packed_documents_keep_their_own_example(table):
    packed = Batch(
        input_ids=torch.tensor([[6, 0, 7, 6, 1, 9, 0, 0]]),
        target_positions=torch.tensor([4, 1]),  # not in the documents' order
        targets=torch.tensor([9, 7]),
        sequence_ids=torch.tensor([[0, 0, 0, 1, 1, 1, -1, -1]]),
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0]]),
        example_ids=(5, 3),
    )
    _, choices = evaluate_classification(
        table, [packed], table_logits, [7, 9], SIDES.words, SIDES.score, lambda rows: rows
    )
    assert [(c.example, c.target, c.prediction) for c in choices] == [(3, 1, 1), (5, 0, 0)]


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("world_size", [1, 3])
def test_generation_over_ranks(model, tokenizer, tmp_path, world_size):
    decoder = create_decoder(tokenizer, max_new_tokens=12)
    answers = decoder(model, PROMPTS)
    references = [
        ["no such thing", tokenizer.decode(a)] if i % 2 else ["w3 w3", "w4"]
        for i, a in enumerate(answers)
    ]

    def rank_part(rank, _, gather):
        return evaluate_generation(
            copy.deepcopy(model),
            decoder,
            tokenizer,
            PROMPTS,
            references,
            [""] * len(references),
            ANSWERS.score,
            gather,
            rank=rank,
            world_size=world_size,
        )

    for values, rows in on_ranks(world_size, rank_part):
        assert [row.example for row in rows] == list(range(6))
        assert [row.prediction_ids for row in rows] == answers
        assert values["exact_match"] == 0.5
        assert list(values) == ["exact_match", "bleu"]
    path = write_predictions(tmp_path, "val", 40, rows)
    assert path.name == "predictions-40.jsonl"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[3]["input"] == "w4 w4 w20 w21" and lines[3]["input_ids"] == [4, 4, 20, 21]
    assert lines[3]["prediction"] == tokenizer.decode(answers[3])
    assert lines[3]["labels"] == references[3] and len(lines[3]["label_ids"]) == 2


def test_what_cannot_be_scored_stops_every_rank():
    asked, stopped = [], []

    def score():
        asked.append(True)
        raise InputError("no database")

    def part(rank, _, gather):
        try:
            score_once(score, gather, rank)
        except InputError as error:
            stopped.append(str(error))

    on_ranks(3, part)
    assert (asked, stopped) == ([True], ["no database"] * 3)


def test_predictions_of_a_step_replace_older_ones(tmp_path):
    row = Row(0, "naïve 漢", [1], "a\nb", [2], ["c"], [[3]])
    write_predictions(tmp_path, "val", 1, [row, row])
    path = write_predictions(tmp_path, "val", 1, [row])
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert "naïve 漢" in line and json.loads(line)["prediction"] == "a\nb"
    write_predictions(tmp_path, "test", 1, [])  # another split is another file
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "predictions-1.jsonl", "predictions-test-1.jsonl",
    ]  # fmt: skip
