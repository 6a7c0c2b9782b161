"""A frozen linear whose weight is kept in fewer bits, with a scale for each of its rows.

Shape suffixes: I input and O output features, i and o those of this rank's shard.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from lobra.layout.shapes import FusedLinear
from lobra.model.base_linear import BaseLinear, Shard, row_numbers
from lobra.model.checkpoint import CheckpointReader, as_slice


class ScaledRows(BaseLinear):
    """Values [o, i] of a weight, and what each of their rows is multiplied by, [o, 1]."""

    values_oi: Tensor
    scales_o1: Tensor

    def __init__(
        self, values_oi: Tensor, scales_o1: Tensor, dtype: torch.dtype, bias_o: Tensor | None
    ) -> None:
        """Have activations of this dtype."""
        super().__init__(bias_o)
        self.dtype = dtype
        self.register_buffer("values_oi", values_oi)
        self.register_buffer("scales_o1", scales_o1)

    @staticmethod
    @abstractmethod
    def stored(reader: CheckpointReader, name: str) -> tuple[Tensor, Tensor]:
        """Return a whole weight of a checkpoint, quantised: [O, I], and its scales, [O, 1]."""

    @classmethod
    def read(
        cls,
        reader: CheckpointReader,
        name: str,
        shard: Shard,
        fused: FusedLinear | None = None,
        bias_o: Tensor | None = None,
    ) -> Self:
        """Read the shard of a linear from a checkpoint."""
        values_OI, scales_O1 = cls.stored(reader, name)
        rows = row_numbers(shard.stored_rows(fused), fused).to(reader.device)
        return cls(values_OI[rows, as_slice(shard.inputs)], scales_O1[rows], reader.dtype, bias_o)
