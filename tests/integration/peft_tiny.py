"""Tiny models of every family, stock and ours, and batches for them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_train.adapters.base import Batch, LossSum, Prepared, Traits
from ssm_train.adapters.registry import FAMILIES, adopt
from ssm_train.peft.spec import load_peft

VOCAB = 61
RANKS = {"dt_proj": 2}  # dt_proj is 64 x 2 in the tiny Mamba


def make_stock(family: str, seed: int = 0, **options) -> nn.Module:
    """A model of the library's own class, with norms and biases away from ones and zeros."""
    torch.manual_seed(seed)
    if family == "gla":
        from fla.models.gla import GLAConfig, GLAForCausalLM

        config = GLAConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=2,
            intermediate_size=48,
            vocab_size=VOCAB,
            initializer_range=0.2,
            norm_eps=1e-1,  # a random head's output may be near zero, and its norm all rounding
            **options,
        )
        model = GLAForCausalLM(config)
    elif family == "bamba":
        from transformers import BambaConfig, BambaForCausalLM

        config = BambaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            attn_layer_indices=[1],
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            initializer_range=0.2,
            **options,
        )
        model = BambaForCausalLM(config)
    else:
        from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

        sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
        if family == "mamba":
            model = MambaForCausalLM(MambaConfig(**sizes, initializer_range=0.2, **options))
        else:
            config = Mamba2Config(
                **sizes, num_heads=4, head_dim=16, n_groups=1, initializer_range=0.2, **options
            )
            model = Mamba2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("conv1d.bias"):
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    return model.eval()


def make_rounded_stock(family: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The stock model in fp32 with the values that `prepare(family, dtype=dtype)` stores."""
    from ssm_train.adapters.common import cast_storage

    model = make_stock(family)
    cast_storage(model, dtype, traits_of(family).keep_fp32)
    return model.float()


def traits_of(family: str) -> Traits:
    return FAMILIES[family]()[0].traits


def prepare(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> Prepared:
    """A model of ours as an adapter's `prepare` leaves it."""
    from ssm_train.adapters.common import cast_storage

    model = make_stock(family, seed, **options)
    adopt(model)
    cast_storage(model, dtype, traits_of(family).keep_fp32)
    return Prepared(model, None, traits_of(family))


def inject(prepared: Prepared, **settings):
    """LoRA of rank 4 on the family's targets, or as the settings say; returns the method."""
    ranks = RANKS if prepared.model.config.model_type == "mamba" else {}
    config = {"peft_type": "LORA", "r": 4, "rank_pattern": ranks} | settings
    if "target_modules" in settings and "rank_pattern" not in settings:
        config["rank_pattern"] = {k: v for k, v in ranks.items() if k in settings["target_modules"]}
    method = load_peft(config).make()
    method.inject(prepared)
    return method


def train_a_little(model: nn.Module, seed: int = 3, scale: float = 0.1) -> None:
    """Moves every trainable tensor, as optimizer steps would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += scale * noise.to(parameter.device)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def make_batch(rows: int = 2, length: int = 13, seed: int = 1) -> Batch:
    ids = tokens(rows, length, seed=seed)
    positions = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
    return Batch(
        input_ids=ids,
        target_positions=positions,
        targets=ids[:, 1:].flatten(),
        sequence_ids=torch.arange(rows)[:, None].expand(rows, length),
        position_ids=torch.arange(length).expand(rows, length),
    )


def token_losses(model: nn.Module, batch: Batch) -> LossSum:
    """Works for stock models as well."""
    logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.target_positions]
    loss = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
    return LossSum(loss, batch.num_targets)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits.float()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()
