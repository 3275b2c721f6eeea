"""The functions of the code base that this package replaces: signatures, return shapes, and that
they train, evaluate and decode what they say."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import make_records
from torch.utils.data import DataLoader

import ssm_train
from ssm_train.data.vocabulary import build_tokenizer
from ssm_train.errors import InputError
from ssm_train.record import MARKER

SIGNATURES = {
    "prepare_gla_model_and_tokenizer": "model_id prec debug peft_json_path",
    "prepare_mamba_model_and_tokenizer": (
        "model_id tokenizer_id prec backend is_custom_tokenizer peft_json_path no_print"
    ),
    "build_and_run_trainer": (
        "model tokenizer output_dir cfg cfg_path learning_rate total_steps logging_steps "
        "gradient_accumulation_steps num_data_workers batch_size eval_epochs skip_eval no_save "
        "eval_steps_override save_steps_override eval_gen resume_from_checkpoint "
        "min_eval_metric_after_epoch seed data val_data val_data_split debug "
        "gradient_checkpointing logits_to_keep"
    ),
    "load_dataset": "data tokenizer split mode return_module",
    "create_decoder": "tokenizer eval_gen",
}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "task_type": "CAUSAL_LM"}
TARGETS = {"gla": ["attn.q_proj", "attn.o_proj"], "mamba": ["in_proj", "out_proj"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models with their tokenizers, PEFT JSONs, and data of prompts and completions."""
    from fla.models.gla import GLAConfig, GLAForCausalLM
    from transformers import MambaConfig, MambaForCausalLM

    place = tmp_path_factory.mktemp("old")
    for split, first in {"train": 0, "val": 30, "test": 50}.items():
        rows = [
            {"prompt": f"{r['question']} =>", "completion": f" {r['answer']}"}
            for r in make_records(12, first)
        ]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    texts = [" ".join(row["question"] for row in make_records(60)) + " =>"]
    tokenizer = build_tokenizer(texts, {"type": "word"})
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    GLAForCausalLM(GLAConfig(**size, num_heads=2, intermediate_size=48)).save_pretrained(
        place / "gla"
    )
    MambaForCausalLM(MambaConfig(**size, state_size=8)).save_pretrained(place / "mamba")
    tokenizer.save_pretrained(place / "gla")
    tokenizer.save_pretrained(place / "tokenizer")
    for family, targets in TARGETS.items():
        (place / f"{family}.json").write_text(json.dumps(LORA | {"target_modules": targets}))
    return place


@pytest.fixture
def tokenizer(place: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place / "tokenizer")


def prepare(place: Path, family: str, **changes: Any) -> tuple[Any, ...]:
    peft = str(place / f"{family}.json")
    if family == "gla":
        options = {"model_id": str(place / "gla"), "prec": "fp32", "debug": False}
        return ssm_train.prepare_gla_model_and_tokenizer(
            **(options | {"peft_json_path": peft} | changes)
        )
    options = {
        "model_id": str(place / "mamba"),
        "tokenizer_id": str(place / "tokenizer"),
        "prec": "fp32",
        "backend": "cuda",
        "is_custom_tokenizer": False,
        "peft_json_path": peft,
    }
    return ssm_train.prepare_mamba_model_and_tokenizer(**(options | changes))


def arguments(place: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """What the old train.py passed on."""
    return {
        "output_dir": str(output_dir),
        "cfg": {"cfg_path": "old.yaml", "optim": "adamw_torch", "weight_decay": 0.01},
        "cfg_path": "old.yaml",
        "learning_rate": 1e-2,
        "total_steps": 4,
        "logging_steps": 1,
        "gradient_accumulation_steps": 1,
        "num_data_workers": 0,
        "batch_size": 4,
        "eval_epochs": 1,
        "skip_eval": False,
        "no_save": False,
        "eval_steps_override": 2,
        "save_steps_override": None,
        "eval_gen": {"num_beams": 2, "max_length": 6, "min_length": 2},
        "resume_from_checkpoint": False,
        "min_eval_metric_after_epoch": None,
        "seed": 7,
        "data": str(place),
        "val_data": None,
        "val_data_split": "val",
        "debug": False,
        **changes,
    }


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_old_names_take_the_old_arguments(name: str) -> None:
    assert list(inspect.signature(getattr(ssm_train, name)).parameters) == SIGNATURES[name].split()
    assert name in dir(ssm_train)


@pytest.mark.parametrize("family", ["gla", "mamba"])
def test_a_prepared_model_trains(family: str, place: Path, tmp_path: Path) -> None:
    model, tokenizer, peft_cfg, *rest = prepare(place, family)
    assert rest == ([] if family == "gla" else [False])
    assert (peft_cfg.r, sorted(peft_cfg.target_modules)) == (2, sorted(TARGETS[family]))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = ssm_train.build_and_run_trainer(
        model=model, tokenizer=tokenizer, **arguments(place, tmp_path / "run")
    )
    assert result.outcome == "finished" and result.steps == 4
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
    cfg, _ = ssm_train.load_config(tmp_path / "run" / MARKER)
    assert (cfg.max_steps, cfg.weight_decay, cfg.seed, cfg.name) == (4, 0.01, 7, "run")
    assert cfg.peft == str(place / f"{family}.json")
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "run" / "predictions-4.jsonl").is_file()
    assert result.test, "the data has a test split"
    again, _ = ssm_train.load_run(tmp_path / "run")
    ids = torch.tensor([tokenizer("say one two =>")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_sdlora_goes_through_both_stages(place: Path, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.json"
    settings = {
        "peft_type": "SD_LORA",
        "num_freeze": {"channel": 0.9, "state": 0.5},
        "num_warmup_it": 2,
    }
    sparse.write_text(json.dumps(settings))
    model, tokenizer, peft_cfg, is_sdlora = prepare(place, "mamba", peft_json_path=str(sparse))
    assert is_sdlora and peft_cfg.stage == "warmup"
    result = ssm_train.build_and_run_trainer(
        model=model, tokenizer=tokenizer, **arguments(place, tmp_path / "run")
    )
    assert result.outcome == "finished" and result.steps == 4
    assert (tmp_path / "run" / "selection.json").is_file()
    again, _ = ssm_train.load_run(tmp_path / "run")
    ids = torch.tensor([tokenizer("say one two =>")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_without_evaluation_its_options_count_for_nothing(place: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = prepare(place, "gla")
    options = {"skip_eval": True, "min_eval_metric_after_epoch": {0: 99.0}, "total_steps": 1}
    result = ssm_train.build_and_run_trainer(
        model=model, tokenizer=tokenizer, **arguments(place, tmp_path / "run", **options)
    )
    assert result.outcome == "finished" and not result.after


def test_hp_variables_win_over_the_json(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HP_PEFT_R", "4")
    monkeypatch.setenv("HP_USE_RSLoRA", "1")
    _, _, peft_cfg = prepare(place, "gla")
    assert (peft_cfg.r, peft_cfg.use_rslora, peft_cfg.lora_alpha) == (4, True, 4)
    monkeypatch.setenv("HP_PEFT_R", "four")
    with pytest.raises(InputError, match="HP_PEFT_R: r is 'four'; expected a whole number"):
        prepare(place, "gla")


def test_without_a_json_everything_trains(place: Path) -> None:
    model, _, peft_cfg, is_sdlora = prepare(place, "mamba", peft_json_path=None, prec="bf16")
    assert peft_cfg is None and is_sdlora is False
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_a_custom_tokenizer_trains_the_embedding(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, *_ = prepare(place, "mamba", is_custom_tokenizer=True, no_print=False)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("embeddings.modules_to_save" in name for name in trained)
    assert len(capsys.readouterr().out.splitlines()) == len(trained)


def test_a_model_of_another_family_or_from_elsewhere(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is mamba: .*; expected gla"):
        prepare(place, "gla", model_id=str(place / "mamba"))
    with pytest.raises(InputError, match="prec is 'fp8'; expected bf16, fp16, fp32"):
        prepare(place, "gla", prec="fp8")
    with pytest.raises(InputError, match="was not made by prepare_gla_model_and_tokenizer"):
        ssm_train.build_and_run_trainer(
            model=torch.nn.Linear(2, 2), tokenizer=None, **arguments(place, tmp_path / "run")
        )
    assert not (tmp_path / "run").exists()
    model, tokenizer, _ = prepare(place, "gla")
    bad = arguments(place, tmp_path / "run", cfg={"optimm": "adamw_torch"})
    with pytest.raises(InputError, match=r"unknown key 'optimm'; did you mean 'optim'"):
        ssm_train.build_and_run_trainer(model=model, tokenizer=tokenizer, **bad)


# ---------------------------------------------------------------- data


def test_examples_in_mode_lm(place: Path, tokenizer: Any) -> None:
    module = ssm_train.load_dataset(str(place), tokenizer, "train", return_module=True)
    (first, second), row = (module.dataset[0], module.dataset[3]), make_records(1)[0]
    ids = tokenizer(f"{row['question']} => {row['answer']}")["input_ids"] + [tokenizer.eos_token_id]
    answer = len(row["answer"].split()) + 1
    assert first["input_ids"].tolist() == ids[:-1]
    labels = [-100] * (len(ids) - 1 - answer) + ids[-answer:]
    assert first["label_ids"].tolist() == labels
    batch = module.data_collator([first, second])
    width = max(len(first["input_ids"]), len(second["input_ids"]))
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "input_ids": (2, width), "label_ids": (2, width), "attention_mask": (2, width),
    }  # fmt: skip
    short = min((first, second), key=lambda e: len(e["input_ids"]))
    place_of_short = 0 if short is first else 1
    length = len(short["input_ids"])
    assert batch["attention_mask"][place_of_short].tolist() == [True] * length + [False] * (
        width - length
    )
    assert set(batch["label_ids"][place_of_short, length:].tolist()) <= {-100}
    assert module.dataset.compute_metrics(None) == {}


def test_examples_in_mode_gen(place: Path, tokenizer: Any) -> None:
    dataset = ssm_train.load_dataset(str(place), tokenizer, "val", mode="gen")
    row = make_records(1, 30)[0]
    assert tokenizer.decode(dataset[0]["input_ids"]) == f"{row['question']} =>"
    assert tokenizer.decode(dataset[0]["label_ids"][:-1]) == row["answer"]
    answers = [record["answer"] for record in make_records(12, 30)]
    half = [a if i % 2 else "no" for i, a in enumerate(answers)]
    values = dataset.compute_metrics(SimpleNamespace(preds=half))
    assert values["exact_match"] == 0.5 and values["bleu"] > 0
    with pytest.raises(InputError, match="5 preds for the 12 examples of .*; give one for each"):
        dataset.compute_metrics(SimpleNamespace(preds=half[:5]))
    with pytest.raises(InputError, match="mode is 'seq'; expected lm or gen"):
        ssm_train.load_dataset(str(place), tokenizer, "val", mode="seq")
    with pytest.raises(InputError, match="split is 'dev'; expected train or val or test"):
        ssm_train.load_dataset(str(place), tokenizer, "dev")


def test_examples_are_a_sequence(place: Path, tokenizer: Any) -> None:
    for mode in ("lm", "gen"):
        dataset = ssm_train.load_dataset(str(place), tokenizer, "val", mode=mode)
        for i in (1, 12):
            assert dataset[-i]["input_ids"].tolist() == dataset[12 - i]["input_ids"].tolist()
        assert len(list(dataset)) == 12
        with pytest.raises(IndexError):
            dataset[12]


def test_a_tokenizer_without_a_pad_token_pads_with_end_of_text(place: Path, tokenizer: Any) -> None:
    tokenizer.pad_token = None
    module = ssm_train.load_dataset(str(place), tokenizer, "train", return_module=True)
    loader = DataLoader(module.dataset, batch_size=12, collate_fn=module.data_collator)
    (batch,) = loader
    padding = batch["input_ids"][~batch["attention_mask"]]
    assert len(padding) and set(padding.tolist()) == {tokenizer.eos_token_id}
    assert (batch["label_ids"][~batch["attention_mask"]] == -100).all()


def test_classification_from_logits(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """GLUE by its old name, from a local copy; a prediction outside the labels is wrong."""
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path / "glue" / "rte"
    folder.mkdir(parents=True)
    rows = [
        {"sentence1": f"one {i}", "sentence2": "two", "label": i % 2, "idx": i} for i in range(20)
    ]
    for split in ("train", "validation"):
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    monkeypatch.setenv("SSM_TRAIN_DATA", str(tmp_path))
    digits = build_tokenizer(["0 1 one two x"], {"type": "word"})
    dataset = ssm_train.load_dataset("glue-tvt_rte", digits, "test")
    assert len(dataset) == 20
    labels = [row["label_ids"][row["label_ids"] != -100] for row in dataset]
    predictions = [torch.nn.functional.one_hot(label, len(digits)) for label in labels]
    right = SimpleNamespace(predictions=predictions, label_ids=labels)
    assert dataset.compute_metrics(right) == {"accuracy": 1.0, "out_of_cls": 0.0}
    predictions[3] = torch.nn.functional.one_hot(torch.tensor([0]), len(digits))
    assert dataset.compute_metrics(right) == {"accuracy": 0.95, "out_of_cls": 0.05}
    some = SimpleNamespace(predictions=predictions[5:1:-1], label_ids=labels[5:1:-1])
    assert dataset.compute_metrics(some) == {"accuracy": 0.75, "out_of_cls": 0.25}
    assert len(ssm_train.load_dataset("glue-tvt_rte_10", digits, "train")) == 10
    assert len(ssm_train.load_dataset("glue-tvt_rte_10", digits, "val")) == 1


# ---------------------------------------------------------------- decoding


def test_a_decoder_gives_tensors_without_the_prompt(place: Path) -> None:
    model, tokenizer, *_ = prepare(place, "mamba")
    decoder = ssm_train.create_decoder(tokenizer, num_beams=2, min_length=5, max_length=6)
    prompts = [tokenizer(text)["input_ids"] for text in ("say one two", "say one two three four")]
    alone = [decoder(model, torch.tensor([prompt])) for prompt in prompts]
    assert all(a.shape[0] == 1 and a.shape[1] <= 6 and a.dtype == torch.int64 for a in alone)
    left = len(prompts[1]) - len(prompts[0])
    ids = torch.tensor([[0] * left + prompts[0], prompts[1]])
    mask = torch.tensor([[0] * left + [1] * len(prompts[0]), [1] * len(prompts[1])])
    both = decoder(model, ids, mask)
    for row, answer in zip(both, alone, strict=True):
        assert row[: answer.shape[1]].tolist() == answer[0].tolist()
