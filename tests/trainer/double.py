"""Watching that nothing is computed in less than fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lobra.trainer import engine
from lobra.trainer.run_spec import RunSpec
from tests.trainer.recording import RecordedResult, train_recorded


class NoSinglePrecision(TorchDispatchMode):
    """While active, an operation that returns numbers of less than fp64 is an error."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                assert value.dtype == torch.float64, f"{func} returned {value.dtype}"
        return results


def train_in_double(run: RunSpec) -> RecordedResult:
    """Train on one rank and record it; every forward and backward pass is watched."""
    plain = engine.run_replica

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        with NoSinglePrecision():
            return plain(*args, **kwargs)

    engine.run_replica = watched  # type: ignore[assignment]
    return train_recorded(run)
