"""Metrics against tables worked out by hand, and against sacrebleu, rouge-score and nltk's page."""

import math
import random

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from ssm_train.errors import InputError
from ssm_train.scores import OUT_OF_CLASS, compute_metrics

# Two classes: TP 3, FN 1, FP 2, TN 4.
REFERENCES = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
PREDICTIONS = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]


def score(name, predictions, references, num_classes=2):
    return compute_metrics([name], predictions, references, num_classes)[name]


def test_two_classes_by_hand():
    assert score("accuracy", PREDICTIONS, REFERENCES) == 7 / 10
    assert score("f1", PREDICTIONS, REFERENCES) == pytest.approx(6 / 9)
    phi = (3 * 4 - 2 * 1) / math.sqrt((3 + 2) * (3 + 1) * (4 + 2) * (4 + 1))
    assert score("mcc", PREDICTIONS, REFERENCES) == pytest.approx(phi)


def test_three_classes_by_hand():
    # Confusion (rows: reference): [[2, 1, 0], [0, 1, 1], [1, 0, 3]]
    references = [0, 0, 0, 1, 1, 2, 2, 2, 2]
    predictions = [0, 0, 1, 1, 2, 0, 2, 2, 2]
    macro = (2 * 2 / (3 + 3) + 2 * 1 / (2 + 2) + 2 * 3 / (4 + 4)) / 3
    assert score("f1", predictions, references, num_classes=3) == pytest.approx(macro)
    # c = 6, s = 9, t = (3, 2, 4), p = (3, 2, 4)
    r_k = (6 * 9 - (9 + 4 + 16)) / math.sqrt((81 - 29) * (81 - 29))
    assert score("mcc", predictions, references) == pytest.approx(r_k)


def test_f1_of_three_classes_stays_macro_when_only_two_of_them_occur():
    other = 8 / 11  # class 0: 2 * 4 / (2 * 4 + 1 + 2)
    assert score("f1", PREDICTIONS, REFERENCES, num_classes=3) == pytest.approx((6 / 9 + other) / 2)


def test_matthews_ends_of_its_range():
    assert score("mcc", [0, 1, 1, 0], [0, 1, 1, 0]) == 1
    assert score("mcc", [1, 0, 0, 1], [0, 1, 1, 0]) == -1
    assert score("mcc", [1, 1, 1, 1], [0, 1, 1, 0]) == 0  # undefined


def test_a_prediction_outside_the_label_set_is_wrong():
    predictions = [1, 1, OUT_OF_CLASS, 0, 1, 1, 0, 0, 0, OUT_OF_CLASS]
    assert score("accuracy", predictions, REFERENCES) == 5 / 10
    assert score("f1", predictions, REFERENCES) == pytest.approx(4 / (4 + 4))
    # c = 5, s = 10, t = (6, 4), p = (4, 4, 2 outside)
    r_k = (5 * 10 - (4 * 6 + 4 * 4)) / math.sqrt((100 - 36) * (100 - 52))
    assert score("mcc", predictions, REFERENCES) == pytest.approx(r_k)
    assert score("f1", [OUT_OF_CLASS] * 2, [0, 2], num_classes=3) == 0


ANSWERS = [
    "the cat sat on the mat today",
    "a quick brown fox jumps over dogs",
    "no",
    "there is nothing here in common",
]
SEVERAL = [
    ["the cat sat on the mat", "a cat was sitting on the mat today"],
    ["the quick brown fox jumps over the lazy dog"],
    ["no", "nope , never", "not at all"],
    ["something else entirely"],
]


def test_bleu_of_one_reference_is_sacrebleus():
    single = [rs[0] for rs in SEVERAL]
    expected = sacrebleu.corpus_bleu(ANSWERS, [single]).score
    assert 1 < expected < 99
    assert score("bleu", ANSWERS, [[r] for r in single]) == pytest.approx(expected, abs=1e-9)


def test_bleu_of_varying_numbers_of_references():
    # A repeated reference changes nothing, so that a full table is the oracle for a ragged one.
    full = [(rs * 3)[:3] if len(rs) != 2 else [*rs, rs[0]] for rs in SEVERAL]
    expected = sacrebleu.corpus_bleu(ANSWERS, [list(stream) for stream in zip(*full, strict=True)])
    single = score("bleu", ANSWERS, [rs[:1] for rs in SEVERAL])
    assert score("bleu", ANSWERS, SEVERAL) == pytest.approx(expected.score, abs=1e-9)
    assert expected.score > single + 1


def test_bleu_by_hand():
    # Precisions 4/5, 2/4, 1/3 and, smoothed, 1/2/2; same length: no brevity penalty.
    expected = 100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25
    assert score("bleu", ["a b c x d"], [["a b c y d"]]) == pytest.approx(expected)


def test_rouge_takes_the_best_reference_of_each_example():
    names = ["rouge1", "rouge2", "rougeL"]
    values = compute_metrics(names, ANSWERS, SEVERAL)
    scorer = rouge_scorer.RougeScorer(names)
    for name in names:
        best = [
            max(scorer.score(r, p)[name].fmeasure for r in rs)
            for p, rs in zip(ANSWERS, SEVERAL, strict=True)
        ]
        assert values[name] == pytest.approx(sum(best) / 4)
    # One pair by hand: 6 of 7 and 6 of 6 words.
    assert score("rouge1", ANSWERS[:1], [SEVERAL[0][:1]]) == pytest.approx(2 * 6 / 13)


def test_rouge_of_ascii_text_is_that_of_rouge_score():
    draw = random.Random(0)
    characters = [chr(code) for code in range(128)] + list("aab  cAB1") * 20
    texts = ["".join(draw.choices(characters, k=40)) for _ in range(200)]
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(names)
    pairs = list(zip(texts, texts[1:], strict=False))
    for prediction, reference in [*pairs, ("It's a well-known_fact.", "it s A well known fact")]:
        values = compute_metrics(names, [prediction], [[reference]])
        theirs = scorer.score(reference, prediction)
        assert values == {name: theirs[name].fmeasure for name in names}


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge1", "rouge2"),
    [
        ("Мама мыла раму", "мама мыла окно", 2 / 3, 1 / 2),
        ("的猫在2024年", "猫在2024年。", 8 / 9, 6 / 7),  # 2024 is one word
        ("ラーメン", "ラーメソ", 3 / 4, 2 / 3),  # the long vowel is a word of its own
        ("हिन्दी भाषा", "हिन्दी में", 1 / 2, 0),  # vowel signs belong to their words
        ("이것은 책", "이것은 집", 1 / 2, 0),
        ("ein schöner Tag", "ein schoner Tag", 2 / 3, 0),
        ("שלום", "עולם", 0, 0),
    ],
)
def test_rouge_sees_words_of_every_script(prediction, reference, rouge1, rouge2):
    assert score("rouge1", [prediction], [[reference]]) == pytest.approx(rouge1)
    assert score("rouge2", [prediction], [[reference]]) == pytest.approx(rouge2)


def meteor_of_different_words(prediction, reference):
    """The equations of Banerjee and Lavie 2005 where no word occurs twice."""
    places = [reference.index(word) if word in reference else None for word in prediction]
    matches = sum(place is not None for place in places)
    if not matches:
        return 0.0
    precision, recall = matches / len(prediction), matches / len(reference)
    continued = sum(
        b is not None and a is not None and b == a + 1
        for a, b in zip(places, places[1:], strict=False)
    )
    f_mean = 10 * precision * recall / (recall + 9 * precision)
    return f_mean * (1 - 0.5 * ((matches - continued) / matches) ** 3)


def test_meteor_is_the_papers_where_no_word_occurs_twice():
    draw, words = random.Random(0), list("abcdefghij")
    pairs = [[draw.sample(words, draw.randint(1, 9)) for _ in range(2)] for _ in range(200)]
    for prediction, reference in pairs:
        expected = meteor_of_different_words(prediction, reference)
        found = score("meteor", [" ".join(prediction)], [[" ".join(reference)]])
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1 - 0.5 / 6**3),
        # With fewest crossings the two "the" keep their order: six runs of one word.
        ("on the mat sat the cat", "the cat sat on the mat", 0.5),
        # Exact "a", then stems "cat" and "walk": one run of three.
        ("a cat walked", "A cats walks", 1 - 0.5 / 3**3),
        # 3 of 4 and 3 of 5 words in one run.
        ("a b c x", "a b c d e", 10 * 0.75 * 0.6 / (0.6 + 9 * 0.75) * (1 - 0.5 / 3**3)),
        ("Stop, thief!", "stop , thief !", 1 - 0.5 / 4**3),
        ("yes", "no", 0),
        ("", "no", 0),
    ],
)
def test_meteor_by_hand(prediction, reference, expected):
    assert score("meteor", [prediction], [[reference]]) == pytest.approx(expected, abs=1e-12)


def test_meteor_of_the_example_in_nltks_documentation():
    answer = (
        "It is a guide to action which ensures that the military always obeys the commands of the "
        "party"
    )
    references = [
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always being under the "
        "command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    ]
    assert round(score("meteor", [answer], [references[:1]]), 4) == 0.6944
    assert round(score("meteor", [answer], [references]), 4) == 0.6944  # the best of the three


def test_meteor_is_the_mean_over_examples_of_the_best_reference():
    single = [
        max(score("meteor", [answer], [[r]]) for r in rs)
        for answer, rs in zip(ANSWERS, SEVERAL, strict=True)
    ]
    assert single[2] == 0.5 and single[3] == 0  # one word in one run; nothing
    assert score("meteor", ANSWERS, SEVERAL) == pytest.approx(sum(single) / 4)


def test_exact_match_looks_at_words_and_every_reference():
    references = [["a b"], ["x", "c  d"], ["e"], [""]]
    assert score("exact_match", [" a  b\n", "c d", "E", ""], references) == 3 / 4


def test_names_are_checked_and_keep_their_order():
    assert list(compute_metrics(["f1", "accuracy"], [1], [1])) == ["f1", "accuracy"]
    with pytest.raises(InputError, match="'acuracy'; did you mean 'accuracy'"):
        compute_metrics(["acuracy"], [1], [1])
