"""Counts the memory that is in use, on any device and on none."""

from __future__ import annotations

import gc
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Knows which memory taken since it began is still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = {StorageWeakRef(x.untyped_storage()) for x in args if isinstance(x, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if StorageWeakRef(storage) not in given:  # else a view
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        return output

    def num_bytes(self) -> int:
        gc.collect()
        return sum(size for storage, size in self.storages.items() if not storage.expired())
