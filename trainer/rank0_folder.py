"""A folder of rank 0's host whose tensors every rank needs, on whatever file systems they are."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor


class Rank0Folder:
    """Ranks read it themselves where all of them see it, else rank 0 sends them what it holds.

    All methods are collective.

    Attributes
    ----------
    path
        Where it is.
    is_shared
        Whether all ranks see it.
    """

    def __init__(self, path: Path, mark: str, group: dist.ProcessGroup) -> None:
        """Find out whether all ranks see the folder.

        Parameters
        ----------
        path
            Where it is, the same for all.
        mark
            A file in it that no other folder of that path has alike.
        group
            Of all ranks, on CPUs.
        """
        self.path = path
        self._group = group
        try:
            own = hashlib.sha256((path / mark).read_bytes()).hexdigest()
        except OSError:
            own = ""
        seen = [""] * dist.get_world_size()
        dist.all_gather_object(seen, own, group=group)
        self.is_shared = len(set(seen)) == 1

    def tensors(self, name: str, wanted: Collection[str]) -> dict[str, Tensor]:
        """Return some tensors of a safetensors file in the folder, others for each rank."""
        if self.is_shared:
            with safe_open(self.path / name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in wanted}
        own = load_file(self.path / name) if dist.get_rank() == 0 else {}
        heads = [[(key, value.shape, value.dtype) for key, value in own.items()]]
        dist.broadcast_object_list(heads, src=0, group=self._group)
        found = {}
        for key, shape, dtype in heads[0]:
            value = own[key] if own else torch.empty(shape, dtype=dtype)
            dist.broadcast(value.view(torch.uint8), src=0, group=self._group)
            if key in wanted:
                found[key] = value
        return {key: found[key] for key in wanted}
