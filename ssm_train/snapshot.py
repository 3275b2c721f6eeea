"""What a run remembers, taken and put back: trained parameters, optimizer and random states.

Everything by parameter name, as tensors and JSON; bit for bit.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssm_train.errors import InputError


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def copy_tensors(
    tensors: Mapping[str, Tensor], into: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """On the CPU, in memory that nothing else changes: that of an earlier copy, `into`, where it is
    there, since new memory takes several times as long."""
    copies = {}
    for name, tensor in tensors.items():
        copy = (into or {}).get(name)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            copy = torch.empty_like(tensor, device="cpu", requires_grad=False)
        copies[name] = copy.copy_(tensor.detach())
    return copies


def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies `tensors` into the trainable parameters; the names must be exactly theirs."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_parameters(tensors, {name: p.shape for name, p in parameters.items()})
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def optimizer_tensors(
    optimizer: Any, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter name>.<exp_avg | exp_avg_sq | step>`."""
    return {
        f"{name}.{key}": value
        for name, parameter in named_parameters
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: Any,
    tensors: Mapping[str, Tensor],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
) -> None:
    """Puts back what `optimizer_tensors` returned, bit for bit; param_groups stay as they are."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in named_parameters if p in groups}
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        by_name.setdefault(name, {})[key] = tensor
    check_names(by_name, parameters)
    for name, parameter in parameters.items():
        optimizer.state.pop(parameter, None)
        on_device = groups[parameter].get("fused") or groups[parameter].get("capturable")
        for key, tensor in by_name.get(name, {}).items():
            if key != "step":
                check_shape(f"{name}.{key}", tensor, parameter.shape)
            # Only the fused and the capturable kernels count steps on the device.
            device = parameter.device if key != "step" or on_device else torch.device("cpu")
            optimizer.state[parameter][key] = tensor.to(device, copy=True)


def check_parameters(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raises InputError unless they are exactly the trained parameters, by names and shapes."""
    check_names(tensors, shapes)
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise InputError(
            f"checkpoint: it lacks {missing[0]!r} and {len(missing) - 1} others of "
            f"{len(shapes)} trained parameters; resume with the config of that run"
        )
    for name, tensor in tensors.items():
        check_shape(name, tensor, shapes[name])


def check_names(given: Collection[str], known: Collection[str]) -> None:
    """Raises InputError for a name that is not known."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(
            f"checkpoint: {unknown[0]!r} and {len(unknown) - 1} others of {len(given)} are not "
            "trained in this run; resume with the config of that run"
        )


def check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    """Raises InputError for another shape."""
    if tensor.shape != shape:
        raise InputError(
            f"checkpoint: {name!r} has shape {list(tensor.shape)}, this run's is "
            f"{list(shape)}; resume with the config of that run"
        )


def collect_rng() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators (CPU, and this process's GPU) as JSON."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "key": numpy_state["state"]["key"].tolist(),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": encode(torch.get_rng_state()),
        "cuda": encode(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
    }


def restore_rng(rng: Mapping[str, Any]) -> None:
    """Puts back what `collect_rng` returned; the GPU's state only where there is a GPU. Raises
    InputError for what it has not returned."""
    try:
        _restore_rng(rng)
    except (
        ArithmeticError,
        AttributeError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise InputError(
            f"checkpoint: its random states are not what a run wrote ({error}); resume from "
            "another one"
        ) from None


def _restore_rng(rng: Mapping[str, Any]) -> None:
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words), gauss))
    state = rng["numpy"]
    np.random.set_state(
        {
            "bit_generator": state["bit_generator"],
            "state": {"key": np.array(state["key"], dtype=np.uint32), "pos": state["pos"]},
            "has_gauss": state["has_gauss"],
            "gauss": state["gauss"],
        }
    )
    torch.set_rng_state(decode(rng["torch"]))
    if rng["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(decode(rng["cuda"]))


def encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
