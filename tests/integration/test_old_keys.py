"""Every key of a mamba-peft config changes in a run what it changed there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from old_commands import LR, PLAIN, STEPS, Command, Seen
from tiny_runs import losses, write_config

from ssm_train.commands import DONE


@pytest.fixture
def see(place: Path, launch: Callable[..., Command]) -> Callable[..., Seen]:
    """A run of PLAIN with changes; the same changes are run once."""

    def run(name: str, **changes: Any) -> Seen:
        log = place / f"{name}.txt"
        if not log.exists():
            config = write_config(place, name, "mamba", **PLAIN | changes)
            done = launch("--cfg", config)
            assert (done.code, done.error) == (DONE, "")
            log.write_text(done.out, encoding="utf-8")
        return Seen(log.read_text(encoding="utf-8"))

    return run


Check = Callable[[Seen, Seen], None]
WARMED = (0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)  # three steps of warm-up, then linear to zero


def other_updates(plain: Seen, changed: Seen) -> None:
    """The same data and start, and another way from there."""
    assert changed.losses[0] == plain.losses[0]
    assert changed.losses[2:] != plain.losses[2:]


def same_run(plain: Seen, changed: Seen) -> None:
    assert changed.losses == plain.losses
    found, expected = (losses(seen.run_dir, "val") for seen in (changed, plain))
    assert found == pytest.approx(expected, abs=1e-6)


def half_the_steps(plain: Seen, changed: Seen) -> None:
    """Twice the examples in each step, of the same data."""
    assert changed.column("step") == [1, 2, 3]
    assert changed.column("tokens")[-1] == plain.column("tokens")[-1]


def rates(*shares: float) -> Check:
    return lambda _, changed: equal(
        changed.column("learning_rate"), pytest.approx([LR * share for share in shares])
    )


def logged(*steps: int) -> Check:
    return lambda _, changed: equal(changed.column("step"), [*steps])


def evaluated(*steps: int) -> Check:
    return lambda _, changed: equal(changed.column("step", "val"), [*steps])


def saved(*steps: int) -> Check:
    return lambda _, changed: equal(changed.saved, [*steps])


def said(text: str) -> Check:
    def check(plain: Seen, changed: Seen) -> None:
        assert text in changed.said and text not in plain.said

    return check


def equal(found: object, expected: object) -> None:
    assert found == expected


def nothing_saved(plain: Seen, changed: Seen) -> None:
    assert plain.saved and not (changed.run_dir / "checkpoints").exists()
    assert changed.losses == plain.losses


def rounded(plain: Seen, changed: Seen) -> None:
    assert changed.losses != plain.losses
    assert changed.losses == pytest.approx(plain.losses, rel=0.05)


def everything_trains(plain: Seen, changed: Seen) -> None:
    assert (plain.run_dir / "adapter").is_dir() and (changed.run_dir / "model").is_dir()
    result = changed.file("result.json")
    assert result["trainable"] == result["parameters"]


def other_order(plain: Seen, changed: Seen) -> None:
    assert changed.run_dir.parent.name == "train_seed7"
    assert changed.losses[0] != plain.losses[0]


def generated(plain: Seen, changed: Seen) -> None:
    assert "bleu" not in plain.file("result.json")["metrics"]
    assert changed.file("result.json")["main_metric"] == "bleu"
    lines = (changed.run_dir / f"predictions-{STEPS}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 9 and all(len(row["prediction_ids"]) <= 3 for row in rows)
    assert {"input", "prediction", "labels", "input_ids", "label_ids"} <= set(rows[0])


def of_a_directory(_: Seen, changed: Seen) -> None:
    assert changed.run_dir.parent.name.endswith("_seed42")
    assert "data 24 train, 9 val, 7 test examples" in changed.said
    assert changed.file("result.json")["test"]["tokens"] > 0


KEYS: list[tuple[str, Any, Check]] = [
    ("data", "{place}", of_a_directory),
    ("val_data", "{place}/test.jsonl", said("data 24 train, 7 val examples")),
    ("val_data_split", "test", said("data 24 train, 7 val, 7 test examples")),
    ("tokenizer", {"type": "bpe", "vocab_size": 300}, said('{"type": "bpe", "vocab_size": 300}')),
    ("num_epochs", 1.5, logged(*range(1, 10))),
    ("num_epochs", 0.4, logged(1, 2)),
    ("num_epochs", 0.01, logged(1)),
    ("prec", "bf16", rounded),
    ("peft", None, everything_trains),
    ("optim", "adamw_torch_fused", same_run),
    ("learning_rate", 5e-3, other_updates),
    ("learning_rate", LR, rates(1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)),
    ("gradient_accumulation_steps", 2, half_the_steps),
    ("num_data_workers", 0, same_run),
    ("batch_size", 8, half_the_steps),
    ("eval_gen", {"max_length": 3, "min_length": 1, "num_beams": 2}, generated),
    ("backend", "torch", same_run),  # a CPU has no other kernels
    ("debug", True, said("data 8 train, 2 val examples; 2 steps, 2 an epoch")),
    ("no_save", True, nothing_saved),
    ("skip_eval", True, evaluated()),
    ("eval_epochs", 0.4, evaluated(2, 4, 6)),
    ("eval_epochs", 0.01, evaluated(*range(1, 7))),
    ("eval_epochs", 0.5, saved(3, 6)),
    ("seed", 7, other_order),
    ("gradient_checkpointing", True, same_run),
    ("logits_to_keep", 1, same_run),
    ("weight_decay", 0.5, other_updates),
    ("max_grad_norm", 0.01, other_updates),
    ("adam_beta1", 0.5, other_updates),
    ("adam_beta2", 0.9, other_updates),
    ("adam_epsilon", 1e-2, other_updates),
    ("lr_scheduler_type", "constant", rates(1, 1, 1, 1, 1, 1)),
    ("warmup_steps", 3, rates(*WARMED)),
    ("warmup_ratio", 0.5, rates(*WARMED)),
    ("max_steps", 4, logged(1, 2, 3, 4)),
    ("logging_steps", None, logged(STEPS)),  # min(50, steps of an epoch)
    ("logging_steps", 4, logged(4, 6)),
    ("eval_steps", 4, evaluated(4, 6)),
    ("save_steps", 4, saved(4, 6)),
    ("eval_batch_size", 2, same_run),
    ("max_length", 14, said("longer than max_length dropped")),
]
"""Key, its value, and what differs then from a run of PLAIN; None takes the key away."""

IN_TEST_OLD_COMMANDS = {"model", "resume", "overwrite", "lock", "min_eval_metric_after_epoch"}
OLD_KEYS = """
    model data val_data val_data_split tokenizer num_epochs prec peft optim learning_rate
    gradient_accumulation_steps num_data_workers batch_size eval_gen backend debug resume overwrite
    lock no_save skip_eval eval_epochs min_eval_metric_after_epoch seed gradient_checkpointing
    logits_to_keep weight_decay max_grad_norm adam_beta1 adam_beta2 adam_epsilon lr_scheduler_type
    warmup_steps warmup_ratio max_steps logging_steps eval_steps save_steps eval_batch_size
    max_length
"""


def test_every_old_key_has_a_test() -> None:
    assert {key for key, _, _ in KEYS} | IN_TEST_OLD_COMMANDS == set(OLD_KEYS.split())


@pytest.mark.parametrize("i", range(len(KEYS)), ids=lambda i: f"{KEYS[i][0]}-{i}")
def test_a_key_does_what_it_says(i: int, place: Path, see: Callable[..., Seen]) -> None:
    key, value, check = KEYS[i]
    if isinstance(value, str):
        value = value.format(place=place)
    changes = {key: value}
    if key in ("data", "val_data_split"):
        changes = {"val_data": None, "data": str(place)} | changes
    check(see("plain"), see(f"{key}-{i}", **changes))


def test_gradient_checkpointing_computes_every_layer_twice(
    place: Path, launch: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssm_train.adapters.mamba_mixer import MambaMixer

    forward, calls = MambaMixer.forward, []

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MambaMixer, "forward", counting)
    config = write_config(place, "recomputed", "mamba", **PLAIN | {"max_steps": 1}, skip_eval=True)
    counts = []
    for text in ("false", "true"):
        calls.clear()
        words = ("--cfg", config, "--overwrite", f"gradient_checkpointing={text}")
        assert launch(*words).code == DONE
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0] > 0
