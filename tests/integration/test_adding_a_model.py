"""docs/adding_a_model.md holds: its blocks, run as they stand, give a model that trains."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from ssm_train.adapters import registry
from ssm_train.adapters.base import Batch, ModelSpec
from ssm_train.config import load_config
from ssm_train.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_model.md"
BLOCKS = re.findall(r"```(python|yaml)\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def family(monkeypatch) -> ModuleType:
    """Steps 1 and 2: the page's file as a module, and its line in the table."""
    language, source = BLOCKS[0]
    assert language == "python"
    module = ModuleType("ssm_train.adapters.llama")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(registry.FAMILIES, "llama", lambda: (module.LlamaAdapter(), module.adopt))
    return module


def small_batch() -> Batch:
    """Two padded rows of 6 and 4 tokens; the last three of each are supervised."""
    ids = torch.randint(1, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    positions = torch.tensor([2, 3, 4, 6, 7, 8])  # flat: row 0 at 2..4, row 1 at 0..2
    return Batch(
        input_ids=ids,
        target_positions=positions,
        targets=ids.flatten()[positions + 1],
        sequence_ids=torch.tensor([[0], [1]]).masked_fill(~mask, -1),
        position_ids=torch.arange(6).expand(2, 6).masked_fill(~mask, 0),
        attention_mask=mask,
    )


def test_the_family_is_routed_and_trains_one_step(family):
    new_model = yaml.safe_load(BLOCKS[2][1])["new_model"] | {"vocab_size": 61}
    spec = ModelSpec(new_model=new_model, gradient_checkpointing=True)
    torch.manual_seed(0)
    adapter, reason = registry.resolve(spec)
    assert reason == "llama: new_model has model_type llama"
    prepared = adapter.prepare(spec)
    targets = list(prepared.traits.lora_targets)
    model = get_peft_model(prepared.model, LoraConfig(r=4, target_modules=targets)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, batch = torch.optim.SGD(trained, lr=1.0), small_batch()

    before = adapter.token_losses(model, batch)
    logits = adapter.token_logits(model, batch)
    expected = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
    torch.testing.assert_close(before.loss, expected)
    assert before.num_targets == 6
    before.loss.backward()
    optimizer.step()
    assert adapter.token_losses(model, batch).loss < before.loss


def test_without_its_line_the_family_is_refused():
    with pytest.raises(InputError, match="llama"):
        registry.resolve(ModelSpec(new_model={"model_type": "llama"}))


def test_the_pages_test_passes_and_can_fail(family, monkeypatch):
    language, source = BLOCKS[1]
    assert language == "python"
    tests = {"adopt": family.adopt}
    exec(compile(source, str(PAGE), "exec"), tests)
    tests["test_logits_equal_stock"]()
    monkeypatch.setattr(
        family.head, "outputs", lambda lm, hidden, **_: (None, lm.lm_head(2 * hidden))
    )
    with pytest.raises(AssertionError):
        tests["test_logits_equal_stock"]()


def test_the_pages_config_is_valid(tmp_path):
    language, source = BLOCKS[2]
    assert language == "yaml"
    (tmp_path / "llama.yaml").write_text(source)
    config, _ = load_config(tmp_path / "llama.yaml")
    assert config.new_model is not None and config.new_model["model_type"] == "llama"
