"""What crosses between processes: the collectives that an engine asks for, from Python or C++. For
`scaling_gpu.py`, and for tests/parallel, which compare it with the plan."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operation of torch's dispatcher -> what it is, and which argument holds whole tensors.
KINDS = {
    "allreduce_": ("all_reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
}


class CollectiveCount(TorchDispatchMode):
    """Counts inside of it. Process groups are called through torch's dispatcher by everyone: our
    code, DeepSpeed, FSDP2, and the reducer of DDP, which is C++."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[str] = Counter()
        """Kind -> bytes of whole tensors: what all-gather makes, what reduce-scatter reads. Without
        fp64, in which the loop adds its targets and status."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := func._opname) != "barrier":
            kind, place = KINDS[name]
            for tensor in tree_leaves(args[place]):
                if isinstance(tensor, Tensor) and tensor.dtype != torch.float64:
                    self.sizes[kind] += tensor.nbytes
        return func(*args, **(kwargs or {}))
