"""Records to texts: templates, lists, labels, references, and what is refused."""

import re
from datetime import date

import pytest

from ssm_train.data.tasks import TASKS, build_task
from ssm_train.data.tasks.quickstart import (
    BASE_WORDINGS,
    EVAL_SIZE,
    FIELDS,
    NEW_WORDING,
    TRAIN_SIZE,
    UNSEEN_SHIPS,
    generate_base,
    generate_quickstart,
    vocabulary_texts,
)
from ssm_train.errors import InputError

SENTIMENT = {
    "type": "classification",
    "prompt": "sentence : {sentence} sentiment :",
    "label_field": "label",
    "labels": {0: "negative", 1: "positive"},
}
TRIPLES = {"type": "generation", "prompt": "{tripleset} =>", "label": " {annotations}"}


@pytest.mark.parametrize("value", [1, "1", 1.0])
def test_classification(value):
    (example,) = build_task(SENTIMENT).render({"sentence": "fine", "label": value}, training=True)
    assert (example.prompt, example.label) == ("sentence : fine sentiment :", "positive")
    assert [segment.learnt for segment in example.segments] == [False, True]
    assert not example.ends  # a class is one token, without an end


def test_classes_may_be_true_and_false():
    task = build_task(SENTIMENT | {"labels": {True: "yes", False: "no"}})
    for value in (True, "true", "True".lower()):
        assert task.render({"sentence": "x", "label": value}, training=True)[0].label == "yes"


def test_lists_are_linearised_and_the_first_reference_is_learnt():
    record = {"tripleset": [["A", "IS", "B"], ["B", "HAS", 3]], "annotations": ["one", "two "]}
    for training in (True, False):
        (example,) = build_task(TRIPLES).render(record, training=training)
        assert (example.prompt, example.label) == ("A : IS : B | B : HAS : 3 =>", " one")
        assert example.references == ("one", "two") and example.ends


def test_each_reference_can_be_learnt():
    task = build_task(TRIPLES | {"references": "each"})
    record = {"tripleset": ["A", "B"], "annotations": ["one", "two"]}
    assert [e.label for e in task.render(record, training=True)] == [" one", " two"]
    (example,) = task.render(record, training=False)
    assert (example.label, example.references) == (" one", ("one", "two"))


@pytest.mark.parametrize("name", ["record", "template", "self"])
def test_references_may_be_in_a_field_of_any_name(name):
    task = build_task({"type": "generation", "prompt": "{a}", "label": f"{{a}} {{{name}}}"})
    (example,) = task.render({"a": "x", name: ["y", "z"]}, training=False)
    assert example.references == ("x y", "x z") and example.label == "x y"


def test_braces_and_numbers_in_templates():
    task = build_task({"type": "generation", "prompt": "{{{n}}} {f}", "label": "{f} {n}"})
    (example,) = task.render({"n": 2.5, "f": False, "other": None}, training=True)
    assert (example.prompt, example.label) == ("{2.5} false", "false 2.5")


def test_a_prompt_may_have_parts():
    spec = TRIPLES | {"prompt": ["say this : ", "{tripleset}", " => "]}
    record = {"tripleset": ["A", "B"], "annotations": ["one"]}
    (example,) = build_task(spec).render(record, training=True)
    assert [segment.text for segment in example.segments] == [
        "say this : ",
        "A : B",
        " => ",
        " one",
    ]
    with pytest.raises(InputError, match=r"has no \{field\}"):
        build_task(spec | {"prompt": ["a", "b"]})


def test_a_prediction_that_is_no_class_is_wrong():
    task = build_task(SENTIMENT | {"metrics": ["accuracy", "f1"]})
    right = [["positive"], ["positive"], ["negative"], ["negative"]]
    values = task.score(["positive", "", "negative", "good"], right, [""] * 4)
    assert values == {"accuracy": 0.5, "f1": 2 / 3, "out_of_cls": 0.5}


def test_every_named_task_renders_its_fields():
    records = {
        "sst2": {"sentence": "good", "label": 1},
        "dart": {"tripleset": [["A", "B", "C"]], "annotations": ["D"]},
        "quickstart": next(generate_quickstart("train")),
    }
    assert records.keys() == TASKS.keys()
    for name, record in records.items():
        (example,) = build_task(name).render(record, training=True)
        assert example.prompt and example.label.strip()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sst3", "task: unknown name 'sst3'; did you mean 'sst2'?"),
        ({}, "task.type is None; expected classification, generation, chat, text"),
        ({"type": "regression"}, "task.type is 'regression'"),
        (SENTIMENT | {"lables": {}}, "task: unknown key 'lables'; did you mean 'labels'"),
        (SENTIMENT | {"labels": {0: "x"}}, "task.labels"),
        (SENTIMENT | {"labels": ["x", "y"]}, "task.labels"),
        (SENTIMENT | {"labels": {1: "x", "1": "y"}}, "two values read the same"),
        (SENTIMENT | {"prompt": "no field"}, "task.prompt is 'no field': has no {field}"),
        (SENTIMENT | {"prompt": "{sentence"}, "task.prompt"),
        (SENTIMENT | {"prompt": "{s.__class__}"}, "{s.__class__} is not a plain field name"),
        (SENTIMENT | {"prompt": "{0}"}, "{0} is not a plain field name"),
        (SENTIMENT | {"metrics": ["bleu"]}, "unknown metric 'bleu'; known: accuracy, f1, mcc"),
        (TRIPLES | {"label": "always"}, "task.label is 'always': has no {field}"),
        (TRIPLES | {"metrics": ["acc"]}, "unknown metric 'acc'"),
        ({"type": "generation", "prompt": "{a}"}, "task.label is missing"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        build_task(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "record", "message"),
    [
        (SENTIMENT, {"sentense": "x", "label": 0}, "no field 'sentence'; did you mean 'sentense'?"),
        (SENTIMENT, {"sentence": "x"}, "no field 'label'; it has 'sentence'"),
        (SENTIMENT, {"sentence": "x", "label": 2}, "label 2 in field 'label'; known: 0, 1"),
        (SENTIMENT, {"sentence": "x", "label": [0]}, "label [0]"),
        (SENTIMENT, {"sentence": None, "label": 0}, "field 'sentence' is or holds null"),
        (SENTIMENT, {"sentence": float("nan"), "label": 0}, "holds a number 'nan'; expected text,"),
        (SENTIMENT, {"sentence": date(2020, 1, 2), "label": 0}, "holds a date '2020-01-02'"),
        (SENTIMENT, {"sentence": {"a": 1}, "label": 0}, "field 'sentence' is or holds an object"),
        (TRIPLES, {"tripleset": [], "annotations": "x"}, "field 'tripleset' is or holds a list"),
        (TRIPLES, {"tripleset": [[["a"]]], "annotations": "x"}, "holds a list"),
        (TRIPLES, {"tripleset": ["a", ["b"]], "annotations": "x"}, "holds a list"),
        (TRIPLES, {"tripleset": "a", "annotations": []}, "the label ' {annotations}' is empty"),
        (TRIPLES, {"tripleset": "a", "annotations": ["x", " "]}, "is empty"),
        (TRIPLES, {"tripleset": "a", "annotations": [["x"]]}, "'annotations' is or holds a list"),
    ],
)
def test_bad_records(spec, record, message):
    with pytest.raises(InputError, match=re.escape(message)):
        build_task(spec).render(record, training=True)


def facts(record: dict) -> dict[str, str]:
    return dict(fact.split(" : ") for fact in record["record"].split(" | "))


def test_quickstart_splits_hold_what_they_say():
    splits = {s: list(generate_quickstart(s)) for s in ("train", "val", "test")}
    assert {s: len(r) for s, r in splits.items()} == {
        "train": TRAIN_SIZE,
        "val": EVAL_SIZE,
        "test": EVAL_SIZE,
    }
    ships = {s: {tuple(sorted(facts(r).items())) for r in rows} for s, rows in splits.items()}
    assert not ships["train"] & ships["val"]
    names = {s: {facts(r)["ship"] for r in rows} for s, rows in splits.items()}
    assert names["train"] | names["val"] == set(FIELDS["ship"]) - set(UNSEEN_SHIPS)
    assert names["val"] <= names["train"]
    assert names["test"] == set(UNSEEN_SHIPS)
    for record in splits["train"][:20]:
        assert record["sentence"] == NEW_WORDING.format(**facts(record))


def test_quickstart_is_the_same_every_time():
    for generate in (generate_base, generate_quickstart):
        assert list(generate("val")) == list(generate("val"))


def test_the_base_model_sees_every_word_but_never_the_new_wording():
    train = [r for r, _ in zip(generate_base("train"), range(3000), strict=False)]
    words = {w for r in train for w in f"{r['record']} {r['sentence']}".split()}
    assert set(NEW_WORDING.replace("{", "").replace("}", "").split()) <= words
    assert words | {"=>"} == {w for text in vocabulary_texts() for w in text.split()}
    for record in train[:50]:
        said = [w.format(**facts(record)) for w in (*BASE_WORDINGS, NEW_WORDING)]
        assert record["sentence"] in said[:4] and record["sentence"] != said[4]
    assert all(len(set(r["sentence"])) == 4 for r in generate_base("val"))
