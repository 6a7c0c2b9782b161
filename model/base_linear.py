"""The frozen product of a linear layer's shard, which adapters only add to.

Shape suffixes: N tokens, i input features and o output features of this rank's shard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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

    def stored_rows(self, fused: FusedLinear | None) -> list[range]:
        """Return where a checkpoint has its output features, a fused linear's part by part."""
        return [self.outputs] if fused is None else fused.part_rows(self.outputs)


def by_group(parts: list[Tensor], fused: FusedLinear | None) -> Tensor:
    """Return rows that a checkpoint has part by part as they lie here: group by group."""
    if fused is None:
        return parts[0]
    widths = zip(parts, fused.widths, strict=True)
    return torch.cat([part.unflatten(0, (-1, width)) for part, width in widths], 1).flatten(0, 1)


def row_numbers(stored: Sequence[range], fused: FusedLinear | None) -> Tensor:
    """Return the numbers of rows that a checkpoint has in these ranges, as they lie here, int64."""
    return by_group([torch.arange(rows.start, rows.stop) for rows in stored], fused)


class BaseLinear(nn.Module, ABC):
    """A frozen linear layer: its product, and the gradient that goes back to its input.

    Neither is recorded by autograd: both are called inside one function that is.
    """

    bias: nn.Parameter | None

    def __init__(self, bias_o: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias_o is None else nn.Parameter(bias_o, requires_grad=False)

    @abstractmethod
    def weight_oi(self) -> Tensor:
        """Return the weight in the dtype of the activations, for as long as one needs it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a new tensor, x W^T + b, [..., o] for [..., i]."""
        return functional.linear(x, self.weight_oi(), self.bias)

    def product(self, x: Tensor) -> Tensor:
        """Return the same without the bias."""
        return functional.linear(x, self.weight_oi())

    def row_squares(self, left_or: Tensor, right_ri: Tensor) -> Tensor:
        """Return the squared lengths of the rows of W + left right, [o].

        In the dtype of the two, which may be finer than the weight's.
        """
        num_rows = max(1, ELEMENTS_AT_ONCE // right_ri.shape[1])
        pairs = zip(self.weight_oi().split(num_rows), left_or.split(num_rows), strict=True)
        sums = [
            torch.addmm(weight.to(left.dtype), left, right_ri).square().sum(1)
            for weight, left in pairs
        ]
        return torch.cat(sums)

    def input_gradient(self, dy_No: Tensor, dx_Ni: Tensor | None) -> Tensor:
        """Return dy W, [N, i], added to ``dx_Ni`` in place if there is one."""
        weight_oi = self.weight_oi()
        return dy_No @ weight_oi if dx_Ni is None else dx_Ni.addmm_(dy_No, weight_oi)


class DenseLinear(BaseLinear):
    """A weight [o, i] in the dtype of the activations."""

    def __init__(self, weight_oi: Tensor, bias_o: Tensor | None) -> None:
        super().__init__(bias_o)
        self.weight = nn.Parameter(weight_oi, requires_grad=False)

    @classmethod
    def read(
        cls,
        reader: CheckpointReader,
        name: str,
        shard: Shard,
        fused: FusedLinear | None = None,
        bias_o: Tensor | None = None,
    ) -> DenseLinear:
        """Read the shard of the linear called ``name`` in the checkpoint."""
        columns = as_slice(shard.inputs)
        parts = [
            reader.read(f"{name}.weight", as_slice(rows), columns)
            for rows in shard.stored_rows(fused)
        ]
        return cls(by_group(parts, fused), bias_o)

    def weight_oi(self) -> Tensor:
        """Return the weight."""
        return self.weight
