"""ZeRO-1, 2 and 3 by DeepSpeed: optimizer, gradients and weights in parts, one a process."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssm_train import distributed, snapshot
from ssm_train.engines import dealing, fsdp
from ssm_train.engines.base import MakeOptimizer
from ssm_train.engines.hollow import HollowModel
from ssm_train.engines.zero_config import fill_sizes
from ssm_train.errors import InputError
from ssm_train.parts import collect

MOMENTS = ("exp_avg", "exp_avg_sq")
SECONDS_TO_BUILD = 600
"""Of an extension, which takes a minute or two."""


class Zero:
    """See `engines.base.Engine`. Trained parameters are fp32, and so are all sums: DeepSpeed's own
    mixed precision stays off, as it would round every weight."""

    keeps_gradients, copies_state, scaler = False, True, None
    model: Any  # DeepSpeed's engine
    optimizer: Any

    def __init__(
        self, device: torch.device, config: Mapping[str, Any], prec: distributed.Precision
    ) -> None:
        """`config`: of DeepSpeed, complete but for sizes that depend on the model."""
        self.device, self.config, self.prec = device, dict(config), prec
        self.stage = int(config["zero_optimization"]["stage"])
        self.name = f"ZeRO-{self.stage}"
        self.shards_weights = self.stage == 3
        self.place = dealing.place() if self.shards_weights else None
        self.contents: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        """Of the model that `spread` got, until `prepare` deals them."""
        self.notes: list[str] = []

    def spread(self, bare: nn.Module) -> nn.Module:
        """A copy by FSDP2: DeepSpeed's parts cannot do without its optimizer."""
        if not self.shards_weights:
            return bare
        self.contents = dealing.contents(bare)
        weights, buffers = self.contents
        copy = HollowModel(bare).model
        fsdp.shard(copy, dict(weights), buffers, self.device)
        return copy

    def prepare(self, bare: nn.Module, make_optimizer: MakeOptimizer) -> None:
        from torch.utils.cpp_extension import get_default_build_root

        await_build(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))
        deepspeed = load_deepspeed(self.device)
        self.bare = bare
        self.hollow = HollowModel(bare) if self.shards_weights else None
        trained = sum(p.numel() for p in bare.parameters() if p.requires_grad)
        widest = max(p.shape[-1] for p in bare.parameters() if p.ndim)
        config, filled = fill_sizes(self.config, trained, widest)
        self.notes = [f"{self.name}: {filled}"]
        if self.shards_weights:
            # A layer is gathered at once: its fused operations read weights past their modules, and
            # hooks in each of its many small modules would take longer than the products.
            for layer in fsdp.find_layers(bare):
                deepspeed.utils.set_z3_leaf_module(layer, True)
        if self.contents is not None:
            deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
            dealer = dealing.Dealer(bare, *self.contents, self.device)
            self.contents = None
            for part in (*fsdp.find_layers(bare), bare):
                dealer.deal(part)
                deepspeed.zero.Init(module=part, config_dict_or_path=config)
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=bare, optimizer=make_optimizer(bare), config=config, dist_init_required=False
        )
        if self.shards_weights:  # after DeepSpeed's hooks, which would gather them once more
            embeddings: nn.Module = bare.get_input_embeddings()  # type: ignore[operator]
            embeddings.register_forward_hook(require_gradient)
        if (stage := self.model.zero_optimization_stage()) != self.stage:
            raise InputError(f"ZeRO-{self.stage} was asked for, but DeepSpeed runs stage {stage}")
        bare.forward = self._in_autocast(bare.forward)
        self.named: dict[str, Any] = {
            name: p for name, p in bare.named_parameters() if p.requires_grad
        }

    def _in_autocast(self, forward: Any) -> Any:
        """DeepSpeed switches autocast off around the model, on a GPU: fp32 trainables would compute
        in fp32, at half the speed and twice the memory."""

        @wraps(forward)
        def run(*inputs: Any, **options: Any) -> Any:
            with distributed.autocast(self.prec, self.device):
                return forward(*inputs, **options)

        return run

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def step(self, max_norm: float, keep_gradients: bool = False) -> Tensor:
        assert not keep_gradients, self.name
        self.optimizer.clip_grad = 0.0 if math.isinf(max_norm) else max_norm
        self.model.step()
        norm = self.model.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        if self.hollow is None:
            yield self.bare
            return
        with self._gathered(self.bare.parameters()):
            weights = {name: p.data for name, p in self.bare.named_parameters()}
            with self.hollow.filled(weights) as model:
                yield model

    # ------------------------------------------------------------ checkpoints

    @contextmanager
    def for_writing(self) -> Iterator[nn.Module | None]:
        if self.hollow is None:
            yield self.bare
            return
        weights = collect(self._one_by_one())
        with self.hollow.filled(weights) if weights else nullcontext() as model:
            yield model

    def _one_by_one(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.bare.named_parameters():
            with self._gathered([parameter]):
                yield name, parameter.data

    def trained(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return collect((name, safe_get_full_fp32_param(p)) for name, p in self.named.items())

    def optimizer_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self._base.state:  # before the first step
            return {}
        self._link_states()
        steps = next(iter(self._base.state.values()))["step"]

        def states() -> Iterator[tuple[str, Tensor]]:
            for name, parameter in self.named.items():
                for key in MOMENTS:
                    yield f"{name}.{key}", safe_get_full_optimizer_state(parameter, key)
                yield f"{name}.step", steps

        return collect(states())

    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        snapshot.check_parameters(tensors, {n: shape_of(p) for n, p in self.named.items()})
        for name, parameter in self.named.items():
            self._write(parameter, None, tensors[name])
            if self.shards_weights:
                copy_part(parameter.ds_tensor, tensors[name])
            else:
                parameter.data.copy_(tensors[name])

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        names = {full.rpartition(".")[0] for full in tensors}
        snapshot.check_names(names, self.named)
        steps = next(value for name, value in tensors.items() if name.endswith(".step"))
        for flat in self._parts:
            self._base.state[flat] = {
                "step": steps.to(flat.device, copy=True),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        self._link_states()
        for name, parameter in self.named.items():
            for key in MOMENTS:
                self._write(parameter, key, tensors[f"{name}.{key}"])

    def free(self) -> nn.Module:
        model = self.bare
        del model.forward  # type: ignore[method-assign]
        if self.hollow is not None:
            with self._gathered(self.bare.parameters()):
                weights = {n: p.data.clone() for n, p in self.bare.named_parameters()}
            model = self.hollow.fill(weights)
        self.close()
        return model

    def close(self) -> None:
        """Lets go of DeepSpeed's engine and all that it holds."""
        self.model.destroy()
        if self.shards_weights:  # its globals keep modules and coordinators for ever: empty ones
            self._base.state.clear()
            vars(self.optimizer).clear()
            for parameter in self.bare.parameters():
                vars(parameter).clear()
                parameter.data, parameter.grad = torch.empty(0), None
        del self.model, self.optimizer, self.bare, self.named
        gc.collect()  # modules and their hooks hold each other

    def _gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        deepspeed = load_deepspeed(self.device)
        return deepspeed.zero.GatheredParameters(list(parameters))

    @property
    def _base(self) -> Any:
        """torch's optimizer, over flat parts of parameters."""
        return self.optimizer.optimizer

    @property
    def _parts(self) -> list[Tensor]:
        if self.shards_weights:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def _link_states(self) -> None:
        """ZeRO-1 and 2 link parameters to moments in the first step, when only those of the first
        group are there."""
        if not self.shards_weights:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _write(self, parameter: Any, key: str | None, value: Tensor) -> None:
        """This process's part of an optimizer's value, or of the fp32 parameter."""
        if self.shards_weights:
            part, _ = self.optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )
            copy_part(part, value)
        else:
            parameter.set_full_hp_param(value.to(parameter.device, torch.float32), key)


def require_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """Of what frozen embeddings give: DeepSpeed reduces a layer's gradients when that of its input
    is there, and for an input without one too early."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def copy_part(part: Tensor, value: Tensor) -> None:
    """`value`, flat and cut evenly over ranks with zeros at the end, into this rank's part."""
    start = dist.get_rank() * part.numel()
    mine = value.flatten()[start : start + part.numel()]
    part.data.zero_()
    part.data.view(-1)[: mine.numel()].copy_(mine)


def shape_of(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def await_build(directory: Path) -> None:
    """Until no other process builds an extension of DeepSpeed there. Raises InputError for a lock
    that one has left which was killed: torch would wait for it for ever."""
    for lock in directory.rglob("deepspeed_*/lock"):
        with suppress(FileNotFoundError):
            while (age := time.time() - lock.stat().st_mtime) < SECONDS_TO_BUILD:
                time.sleep(0.2)
            raise InputError(
                f"{lock} says since {age / 60:.0f} minutes that an extension of DeepSpeed is being "
                "built; remove it if no process does, as one that was killed leaves it"
            )


def load_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for this kind of device. Raises InputError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # no launcher: this process is alone
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(
            f"ZeRO needs DeepSpeed: DS_BUILD_OPS=0 pip install 'ssm_train[deepspeed]' ({error})"
        ) from error
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    return deepspeed
