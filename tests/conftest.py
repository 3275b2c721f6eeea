"""Tiny models for every test, and no network: a test that wants the hub fails at once."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
# Tokenized data of tests is kept apart, and not from one test session to the next.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ssm_train_tests_")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # read once, when triton is imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-config",
        action="store_true",
        help="on a GPU: kernels of fla and mamba_ssm run with one configuration and are not tuned",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("one_config") and torch.cuda.is_available():
        from one_config import take_one_config

        take_one_config()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def tiny_config(family: str, **changes: Any) -> Any:
    """A configuration of a few thousand parameters: "mamba" or "mamba2"."""
    from transformers import Mamba2Config, MambaConfig

    values: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 24,
        "state_size": 8,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "mamba":
        return MambaConfig(**values | changes)
    assert family == "mamba2", family
    return Mamba2Config(**values | {"head_dim": 8, "num_heads": 6, "n_groups": 2} | changes)


def grouped_norm(self: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Mamba-2's gated norm as mamba_ssm defines it: each group of channels by itself."""
    x = x * torch.sigmoid(gate) * gate
    groups = x.split(getattr(self, "group_size", x.shape[-1]), dim=-1)
    normed = [
        g / (g.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt() for g in groups
    ]
    return self.weight * torch.cat(normed, -1)


@pytest.fixture
def tiny_stock_model(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """(family, **config changes) -> transformers' own model in fp32, all weights random."""

    def build(family: str, **changes: Any) -> Any:
        from transformers import Mamba2ForCausalLM, MambaForCausalLM

        torch.manual_seed(0)
        stock_class = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}[family]
        model = stock_class(tiny_config(family, **changes))
        with torch.no_grad():  # no zeros or ones: each parameter must matter
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        if family == "mamba2" and not hasattr(model.backbone.layers[0].mixer.norm, "group_size"):
            # transformers 5.17 takes all groups together, a mistake that later ones corrected.
            for layer in model.backbone.layers:
                mixer = layer.mixer
                mixer.norm.group_size = mixer.intermediate_size // mixer.n_groups
                monkeypatch.setattr(type(mixer.norm), "forward", grouped_norm)
        return model

    return build


@pytest.fixture
def tiny_model(tiny_stock_model: Callable[..., Any]) -> Callable[..., Any]:
    """(family, **config changes) -> the same model with this project's forwards."""

    def build(family: str, **changes: Any) -> Any:
        from ssm_train.adapters.registry import adopt

        model = tiny_stock_model(family, **changes)
        adopt(model)
        return model

    return build


@pytest.fixture
def write_tokenizer() -> Callable[..., None]:
    """(directory, number of words, eos=True): a word-level tokenizer's files."""

    def write(directory: Path, size: int = 61, eos: bool = True) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = ["<unk>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, size))]
        tokenizer = Tokenizer(
            models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        names = {"unk_token": "<unk>", "bos_token": "<bos>"} | (
            {"eos_token": "<eos>"} if eos else {}
        )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)

    return write


@pytest.fixture
def free_port() -> int:
    """A TCP port on which a rendezvous can listen."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
