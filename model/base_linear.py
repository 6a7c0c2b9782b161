"""The frozen product of a linear layer's shard, which adapters only add to.

Shape suffixes: N tokens, i input features and o output features of this rank's shard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lobra.layout.shapes import FusedLinear
from lobra.model.checkpoint import CheckpointReader, as_slice

ELEMENTS_AT_ONCE = 1 << 24  # of a weight, in the adapters' dtype: 64 MiB in fp32


@dataclass(frozen=True)
class Shard:
    """This rank's part of a linear layer: contiguous input and output features."""

    inputs: range
    outputs: range
    in_features: int
    out_features: int

    @property
    def is_row_parallel(self) -> bool:
        """Return whether the input features are split (the output is then summed)."""
        return len(self.inputs) < self.in_features


class BaseLinear(nn.Module, ABC):
    """A frozen linear layer: its product, and the gradient that goes back to its input.

    Neither is recorded by autograd: both are called inside one function that is.
    """

    bias: nn.Parameter | None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return a new tensor [..., o] for [..., i]."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Return the same without the bias."""

    @abstractmethod
    def row_squares(self, left_or: Tensor, right_ri: Tensor) -> Tensor:
        """Return [o], the squared lengths of the rows of the weight plus left right.

        In the dtype of the two, which may be finer than the weight's.
        """

    @abstractmethod
    def input_gradient(self, dy_No: Tensor, dx_Ni: Tensor | None) -> Tensor:
        """Return the gradient [N, i] of the input, added to ``dx_Ni`` in place if there is one."""


class DenseLinear(BaseLinear):
    """A weight [o, i] in the dtype of the activations."""

    def __init__(self, weight_oi: Tensor, bias_o: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_oi, requires_grad=False)
        self.bias = None if bias_o is None else nn.Parameter(bias_o, requires_grad=False)

    @classmethod
    def read(cls, reader: CheckpointReader, name: str, shard: Shard, has_bias: bool) -> DenseLinear:
        """Read the shard of the linear called ``name`` in the checkpoint."""
        rows = as_slice(shard.outputs)
        weight_oi = reader.read(f"{name}.weight", rows, as_slice(shard.inputs))
        return cls(weight_oi, reader.read(f"{name}.bias", rows) if has_bias else None)

    @classmethod
    def read_fused(
        cls, reader: CheckpointReader, name: str, fused: FusedLinear, shard: Shard
    ) -> DenseLinear:
        """Read the shard of a fused linear without bias, its features group by group."""
        width = fused.group_width
        groups = range(shard.outputs.start // width, shard.outputs.stop // width)
        parts = [
            reader.read(f"{name}.weight", as_slice(rows)).unflatten(0, (len(groups), -1))
            for rows in fused.part_rows(groups)
        ]
        return cls(torch.cat(parts, dim=1).flatten(0, 1), None)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, [..., o] for [..., i]."""
        return functional.linear(x, self.weight, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T, [..., o] for [..., i]."""
        return functional.linear(x, self.weight)

    def row_squares(self, left_or: Tensor, right_ri: Tensor) -> Tensor:
        """Return the squared lengths of the rows of W + left right, [o]."""
        num_rows = max(1, ELEMENTS_AT_ONCE // right_ri.shape[1])
        pairs = zip(self.weight.split(num_rows), left_or.split(num_rows), strict=True)
        sums = [
            torch.addmm(weight.to(left.dtype), left, right_ri).square().sum(1)
            for weight, left in pairs
        ]
        return torch.cat(sums)

    def input_gradient(self, dy_No: Tensor, dx_Ni: Tensor | None) -> Tensor:
        """Return dy W, [N, i], added to ``dx_Ni`` in place if there is one."""
        return dy_No @ self.weight if dx_Ni is None else dx_Ni.addmm_(dy_No, self.weight)
