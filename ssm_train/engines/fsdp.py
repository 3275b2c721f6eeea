"""FSDP2 by torch: weights, gradients and optimizer in parts, gathered layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ssm_train import snapshot
from ssm_train.engines import dealing
from ssm_train.engines.base import MakeOptimizer
from ssm_train.engines.hollow import HollowModel
from ssm_train.engines.replicated import average
from ssm_train.parts import collect, full, like, local


class Fsdp:
    """See `engines.base.Engine`. What has another dtype than most weights, such as the fp32
    adapters and step sizes of a bf16 base, stays whole on every process: a group that is gathered
    together may not mix them."""

    name, scaler = "FSDP2", None
    shards_weights, copies_state, keeps_gradients = True, True, False
    model: Any
    optimizer: Any

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.place: str | None = dealing.place()
        self.notes: list[str] = []
        self.hollow: HollowModel | None = None  # once weights are in parts

    def spread(self, bare: nn.Module) -> nn.Module:
        """`bare` itself, in parts."""
        self.hollow = HollowModel(bare)
        shard(bare, *dealing.contents(bare), self.device)
        return bare

    def prepare(self, bare: nn.Module, make_optimizer: MakeOptimizer) -> None:
        if self.hollow is None:
            self.spread(bare)
        self.model = self.bare = bare
        self.optimizer = make_optimizer(bare)
        self.named = {n: p for n, p in bare.named_parameters() if p.requires_grad}
        self.replicated = [p for p in self.named.values() if not isinstance(p, DTensor)]
        sizes = {True: 0, False: 0}
        for parameter in bare.parameters():
            sizes[isinstance(parameter, DTensor)] += parameter.numel()
        self.notes = [
            f"FSDP2: {sizes[True]:,} parameters ({main_dtype(bare)}) in parts, "
            f"{sizes[False]:,} whole on every process"
        ]

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_norm: float, keep_gradients: bool = False) -> Tensor:
        assert not keep_gradients, self.name
        average(self.replicated)
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        norm = self._norm(gradients)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Of gradients in parts and whole ones together: [] fp32."""
        squares = torch.zeros(2, device=self.device)
        for kind in (True, False):
            of_kind = [local(g) for g in gradients if isinstance(g, DTensor) is kind]
            if of_kind:
                squares[int(kind)] = torch.nn.utils.get_total_norm(of_kind).float() ** 2
        parts = squares[1:].clone()
        dist.all_reduce(parts)
        return (squares[0] + parts[0]).sqrt()

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        assert self.hollow is not None
        weights = {name: full(p) for name, p in self.bare.named_parameters()}
        with self.hollow.filled(weights) as model:
            yield model

    # ------------------------------------------------------------ checkpoints

    @contextmanager
    def for_writing(self) -> Iterator[nn.Module | None]:
        assert self.hollow is not None
        weights = collect((name, full(p)) for name, p in self.bare.named_parameters())
        with self.hollow.filled(weights) if weights else nullcontext() as model:
            yield model

    def trained(self) -> dict[str, Tensor]:
        return collect((name, full(p)) for name, p in self.named.items())

    def optimizer_state(self) -> dict[str, Tensor]:
        named = snapshot.optimizer_tensors(self.optimizer, self.named.items())
        return collect((name, full(value)) for name, value in named.items())

    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        snapshot.check_parameters(tensors, {n: p.shape for n, p in self.named.items()})
        with torch.no_grad():
            for name, parameter in self.named.items():
                local(parameter).copy_(local(like(parameter, tensors[name])))

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        parts = {}
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(".")
            parameter = self.named.get(name)
            whole = key == "step" or parameter is None
            parts[full_name] = value if whole else like(parameter, value)
        snapshot.load_optimizer_tensors(self.optimizer, parts, self.named.items())

    def free(self) -> nn.Module:
        assert self.hollow is not None
        model = self.hollow.fill({name: full(p) for name, p in self.bare.named_parameters()})
        self.hollow = None
        del self.model, self.optimizer, self.bare, self.named, self.replicated
        return model


def shard(
    model: nn.Module,
    weights: dict[str, Tensor],
    buffers: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """All ranks. Lays a model in parts on `device`, layer by layer, with these weights of rank 0.
    Parameters of another dtype than most stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    dtype = main_dtype(model)
    dealer = dealing.Dealer(model, weights, buffers, device)
    for part in (*find_layers(model), model):
        dealer.deal(part)
        whole = {p for p in part.parameters() if p.dtype != dtype}
        fully_shard(part, mesh=mesh, ignored_params=whole)


def main_dtype(model: nn.Module) -> torch.dtype:
    """Of most numbers in the model's weights."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers: what the longest list of modules holds."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
