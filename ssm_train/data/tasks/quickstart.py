"""The quickstart's own data: records of ships, and sentences that say them. A base model learns
four wordings; fine-tuning teaches a fifth, made of words that the base knows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from ssm_train.data.tasks.text import GenerationTask

FIELDS: dict[str, tuple[str, ...]] = {
    "ship": (
        *("albatross", "anemone", "bluebell", "calypso", "cormorant", "driftwood", "emerald"),
        *("firefly", "gannet", "halcyon", "juniper", "kestrel", "lantern", "marigold"),
        *("mistral", "nautilus", "osprey", "pelican", "quicksilver", "rosemary", "sandpiper"),
        *("thistle", "undine", "valiant", "wanderer", "willow", "yarrow", "zephyr"),
    ),
    "kind": ("barge", "brig", "clipper", "cutter", "galley", "ketch", "schooner", "trawler"),
    "port": (
        *("bergen", "bristol", "cadiz", "gdansk", "genoa", "hull", "lisbon", "malaga"),
        *("nantes", "oslo", "porto", "riga", "split", "trieste"),
    ),
    "cargo": (
        *("apples", "barley", "copper", "cotton", "honey", "lemons", "paper", "salt", "silk"),
        *("tea", "timber", "wine"),
    ),
    "colour": ("black", "blue", "crimson", "green", "grey", "ochre", "white", "yellow"),
}

UNSEEN_SHIPS = FIELDS["ship"][2::3]
"""Names that fine-tuning never sees; the base model saw them."""

BASE_WORDINGS = (
    "{ship} is a {colour} {kind} from {port} that carries {cargo} .",
    "the {colour} {kind} {ship} brings {cargo} home to {port} .",
    "from {port} sails {ship} , a {colour} {kind} full of {cargo} .",
    "look for {cargo} on {ship} , the {colour} {kind} of {port} .",
)
NEW_WORDING = "for {cargo} from {port} , look to the {kind} {ship} that is {colour} ."

QUICKSTART = GenerationTask(
    type="generation",
    prompt="{record} =>",
    label=" {sentence}",
    metrics=["exact_match", "bleu"],
)

BASE_SIZES = {"train": 32_768, "val": 512, "test": 512}
TRAIN_SIZE, EVAL_SIZE = 900, 256

Ship = tuple[str, ...]


def generate_base(split: str) -> Iterator[dict[str, Any]]:
    """Records for the base model, in all names and the four wordings.

    The wording of a training record is drawn; in evaluation any of the four is right.
    """
    draw = random.Random(f"quickstart_base {split} 0")
    for _ in range(BASE_SIZES[split]):
        ship = _draw_ship(draw, FIELDS["ship"])
        sentences = [_say(wording, ship) for wording in BASE_WORDINGS]
        draw.shuffle(sentences)
        yield {
            "record": _list_facts(ship, draw),
            "sentence": sentences[0] if split == "train" else sentences,
        }


def generate_quickstart(split: str) -> Iterator[dict[str, Any]]:
    """Records for fine-tuning, in the fifth wording.

    Splits: train (900); val, other combinations of the same words; test, ships whose names are
    in `UNSEEN_SHIPS` and in neither of the others.
    """
    seen = tuple(name for name in FIELDS["ship"] if name not in UNSEEN_SHIPS)
    draw = random.Random("quickstart 0")
    ships = _draw_different_ships(draw, seen, TRAIN_SIZE + EVAL_SIZE)
    chosen = {
        "train": ships[:TRAIN_SIZE],
        "val": ships[TRAIN_SIZE:],
        "test": _draw_different_ships(draw, UNSEEN_SHIPS, EVAL_SIZE),
    }[split]
    draw = random.Random(f"quickstart {split} 0")
    for ship in chosen:
        yield {"record": _list_facts(ship, draw), "sentence": _say(NEW_WORDING, ship)}


def vocabulary_texts() -> list[str]:
    """Texts that hold every word of all wordings, so that base and fine-tuning share ids."""
    wordings = [wording.replace("{", "").replace("}", "") for wording in BASE_WORDINGS]
    values = [" ".join(values) for values in FIELDS.values()]
    return [*wordings, NEW_WORDING.replace("{", "").replace("}", ""), *values, "| : =>"]


def _draw_ship(draw: random.Random, names: tuple[str, ...]) -> Ship:
    return tuple(draw.choice(names if f == "ship" else values) for f, values in FIELDS.items())


def _draw_different_ships(draw: random.Random, names: tuple[str, ...], count: int) -> list[Ship]:
    ships: dict[Ship, None] = {}
    while len(ships) < count:
        ships[_draw_ship(draw, names)] = None
    return list(ships)


def _list_facts(ship: Ship, draw: random.Random) -> str:
    """`port : riga | ship : osprey | ...`, in an order of its own."""
    facts = [f"{field} : {value}" for field, value in zip(FIELDS, ship, strict=True)]
    draw.shuffle(facts)
    return " | ".join(facts)


def _say(wording: str, ship: Ship) -> str:
    return wording.format(**dict(zip(FIELDS, ship, strict=True)))
