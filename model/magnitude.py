"""DoRA: the rows of an adapted weight have lengths of their own (arXiv 2402.09353).

    y = m / n * (W x + s B A x),    n the lengths of the rows of W + s B A

n is a constant to the gradient, as the paper proposes (section 4.3) and PEFT does. What drops out
of x before A drops out before W too, but not of the plain product W x: with x' for what is left,
y = W x + (m / n - 1) W x' + m / n * s B A x'.

Nothing is kept for the gradient of m but x: W x is computed again.

A row-parallel shard has a part of every row: its squares are summed over the group, and its part of
the output is scaled like the whole. So each shard's gradient of m is its own contribution, too, and
the gradient is their sum.

Shape suffixes: n tokens, i and o input and output features of this rank's shard, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lobra.model.base_linear import BaseLinear


@dataclass
class Magnitude:
    """A task's magnitudes on one linear, cut to the shard: views into its slot.

    `norm_o` and, in the activations' dtype, `excess_o` = m / n - 1 are as of the last `renew`.
    """

    base: BaseLinear
    dtype: torch.dtype
    scaling: float
    A_ri: Tensor
    B_ro: Tensor
    m_o: Tensor
    gradient_o: Tensor

    def squares_o(self) -> Tensor:
        """Return the shard's part of the squared lengths of the rows."""
        return self.base.row_squares(self.B_ro.t() * self.scaling, self.A_ri)

    def renew(self, squares_o: Tensor) -> None:
        """Compute with weights that have changed, whose rows have these squared lengths."""
        self.norm_o = squares_o.sqrt()
        self.excess_o = (self.m_o / self.norm_o - 1.0).to(self.dtype)

    def add_gradient(self, dy_no: Tensor, unscaled_no: Tensor) -> None:
        """Add the gradient of the magnitudes, by that of the outputs and what was scaled."""
        sum_o = (dy_no * unscaled_no).sum(0, dtype=self.gradient_o.dtype)
        self.gradient_o.addcdiv_(sum_o, self.norm_o)
