"""One of an adapter's tensors: its name and shape in PEFT, and how it lies in memory.

A tensor is kept as *rows*, one for each of its ranks: A as [r, I] like PEFT, B as [r, O], the
transpose of PEFT's. Rows of several tasks, one below the other, are then one matrix, and so are
those of several linears.

Shape suffixes: I input features, O output features, f either, r LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lobra.model.base_linear import Shard
from lobra.model.site import PEFT_PREFIX, Site


@dataclass(frozen=True)
class AdapterTensor:
    """One of an adapter's tensors.

    Attributes
    ----------
    name
        PEFT's name.
    site
        Where it is.
    side
        Whether it has a column for each of the site's inputs (A) or outputs (B), or one a rank.
    rank
        Its rows, those of a vector apart, which has one.
    bound
        At the start its elements are uniform in [-bound, bound].
    seed
        Of that draw.
    rate_factor
        What the task's learning rate is multiplied by.
    is_vector
        Whether PEFT has its only row as a vector.
    center
        What is added to its elements at the start.
    from_base
        Whether it starts from the base's weights instead (`lobra.trainer.first_values`).
    """

    name: str
    site: Site
    side: Literal["inputs", "outputs", "ranks"]
    rank: int
    bound: float
    seed: int
    rate_factor: float = 1.0
    is_vector: bool = False
    center: float = 0.0
    from_base: bool = False

    @property
    def base_name(self) -> str:
        """Its name in the base model's checkpoint, if it is a tensor of the base."""
        return self.name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")

    @property
    def num_columns(self) -> int:
        """Columns of the unsharded tensor."""
        if self.side == "ranks":
            return self.rank
        return self.site.in_features if self.side == "inputs" else self.site.out_features

    @property
    def num_rows(self) -> int:
        """Rows it lies in memory as."""
        return 1 if self.is_vector else self.rank

    @property
    def numel(self) -> int:
        """Elements of the unsharded tensor."""
        return self.num_rows * self.num_columns

    @property
    def shape(self) -> tuple[int, ...]:
        """PEFT's shape: A [r, I], B [O, r], a vector [f]."""
        if self.is_vector:
            return (self.num_columns,)
        if self.side == "inputs":
            return self.rank, self.num_columns
        return self.num_columns, self.rank

    def as_peft(self, rows_rf: Tensor) -> Tensor:
        """Return rows as PEFT has them: a view or, at a fused linear, a copy."""
        if self.side == "outputs":
            rows_rf = self.site.part_by_part(rows_rf)
        if self.is_vector:
            return rows_rf[0]
        return rows_rf if self.side == "inputs" else rows_rf.t()

    def as_rows(self, value: Tensor) -> Tensor:
        """Return what PEFT has as rows."""
        if self.is_vector:
            rows_rf = value.unsqueeze(0)
        else:
            rows_rf = value if self.side == "inputs" else value.t()
        return self.site.grouped(rows_rf) if self.side == "outputs" else rows_rf

    def cut(self, rows_rf: Tensor, shard: Shard) -> Tensor:
        """Return a view of the columns that belong to a shard of the site."""
        if self.side == "ranks":
            return rows_rf
        columns = shard.inputs if self.side == "inputs" else shard.outputs
        return rows_rf[:, columns.start : columns.stop]

    def start(self) -> Tensor:
        """Return the rows that training starts from: fp32, on the CPU, the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed)
        rows_rf = torch.empty(self.num_rows, self.num_columns)
        return rows_rf.uniform_(-self.bound, self.bound, generator=generator).add_(self.center)
