"""FSDP2 by torch: weights, gradients and optimizer in parts, gathered layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ssm_train import snapshot
from ssm_train.engines.base import MakeOptimizer
from ssm_train.engines.hollow import HollowModel


class Fsdp:
    """See `engines.base.Engine`. What has another dtype than most weights, such as the fp32
    adapters and step sizes of a bf16 base, stays whole on every process: a group that is gathered
    together may not mix them."""

    name, shards_weights, keeps_gradients, scaler = "FSDP2", True, False, None
    model: Any
    optimizer: Any

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.notes: list[str] = []

    def prepare(self, bare: nn.Module, make_optimizer: MakeOptimizer) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.hollow = HollowModel(bare)
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        sizes: Counter[torch.dtype] = Counter()
        for parameter in bare.parameters():
            sizes[parameter.dtype] += parameter.numel()
        (dtype, _), *_ = sizes.most_common()
        whole = {p for p in bare.parameters() if p.dtype != dtype}
        for layer in find_layers(bare):
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        fully_shard(bare, mesh=mesh, ignored_params=whole)
        self.model = self.bare = bare
        self.optimizer = make_optimizer(bare)
        self.named = {n: p for n, p in bare.named_parameters() if p.requires_grad}
        self.replicated = [p for p in self.named.values() if not isinstance(p, DTensor)]
        parts = sum(p.numel() for p in bare.parameters() if isinstance(p, DTensor))
        self.notes = [
            f"FSDP2: {parts:,} parameters ({dtype}) in parts, "
            f"{sum(p.numel() for p in whole):,} whole on every process"
        ]

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_norm: float, keep_gradients: bool = False) -> Tensor:
        assert not keep_gradients, self.name
        average([p.grad for p in self.replicated if p.grad is not None])
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
        model = self.hollow.fill({name: full(p) for name, p in self.bare.named_parameters()})
        try:
            yield model
        finally:
            self.hollow.drain()

    # ------------------------------------------------------------ checkpoints

    def trained(self) -> dict[str, Tensor]:
        return {name: full(p) for name, p in self.named.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        named = snapshot.optimizer_tensors(self.optimizer, self.named.items())
        return {name: full(value) for name, value in named.items()}

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
        model = self.hollow.fill({name: full(p) for name, p in self.bare.named_parameters()})
        del self.model, self.optimizer, self.bare, self.named, self.replicated
        return model


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers: what the longest list of modules holds."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def average(gradients: list[Tensor]) -> None:
    """All ranks. In one collective."""
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Any, value: Tensor) -> Tensor:
    """A whole value, cut as the parameter is."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
