"""VeRA: two random matrices for all linears, scaled by what is learned (arXiv 2310.11454).

    y = W x + b * B (d * A x)

A and B are frozen and as large as the largest of the task's linears; a smaller one takes their
first columns and rows. b and d are vectors, a linear's own.

Shape suffixes: I and O the most input and output features of a linear, r rank, n tokens, o output
features of this rank's shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lobra.layout.shapes import FusedLinear, ModelShape
from lobra.model.site import Site

PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")  # PEFT's names


@dataclass(frozen=True)
class Projections:
    """The frozen matrices: A [r, I] and, transposed, B [r, O]."""

    A_rI: Tensor
    B_rO: Tensor
    _grouped: dict[FusedLinear, Tensor] = field(default_factory=dict, init=False, compare=False)

    @classmethod
    def drawn(
        cls, rank: int, modules: tuple[str, ...], shape: ModelShape, seed: int
    ) -> Projections:
        """Draw them as PEFT does from its `projection_prng_key`: fp32, on the CPU.

        Uniform within sqrt(6 / features that are summed over), A first (Kaiming, arXiv 1502.01852).
        """
        sizes = [shape.module_sizes()[module] for module in modules]
        most_inputs, most_outputs = map(max, zip(*sizes, strict=True))
        generator = torch.Generator().manual_seed(seed)
        A_rI, B_Or = torch.empty(rank, most_inputs), torch.empty(most_outputs, rank)
        for matrix in (A_rI, B_Or):
            bound = math.sqrt(6.0 / matrix.shape[1])
            matrix.uniform_(-bound, bound, generator=generator)
        return cls(A_rI, B_Or.t().contiguous())

    def to(self, device: torch.device, dtype: torch.dtype) -> Projections:
        """Return them elsewhere."""
        return Projections(self.A_rI.to(device, dtype), self.B_rO.to(device, dtype))

    def B_at(self, site: Site) -> Tensor:
        """Return B [r, O] of a linear, its features as they lie there."""
        B_rO = self.B_rO[:, : site.out_features]
        if site.fused is None:
            return B_rO
        if site.fused not in self._grouped:  # the same in every layer
            self._grouped[site.fused] = site.grouped(B_rO)
        return self._grouped[site.fused]

    @property
    def nbytes(self) -> int:
        """Bytes of both, and of what B is at fused linears."""
        return sum(matrix.nbytes for matrix in (self.A_rI, self.B_rO, *self._grouped.values()))

    def named(self) -> dict[str, Tensor]:
        """Return them with PEFT's names and shapes."""
        return dict(zip(PROJECTIONS, (self.A_rI, self.B_rO.t().contiguous()), strict=True))


@dataclass(frozen=True)
class Vectors:
    """What a task learns at a linear: views into its slot, b cut to the shard."""

    b_o: Tensor
    gradient_b_o: Tensor
    gradient_d_r: Tensor

    def add_to(self, y_no: Tensor, product_no: Tensor) -> None:
        """Add b * B (d * A x) to outputs in place; ``product_no`` is it without b."""
        y_no.addcmul_(product_no, self.b_o.to(y_no.dtype))

    def back(self, dy_no: Tensor, product_no: Tensor) -> Tensor:
        """Return the gradient of the product; b's is added into the slot."""
        self.gradient_b_o.add_((dy_no * product_no).sum(0, dtype=self.gradient_b_o.dtype))
        return dy_no * self.b_o.to(dy_no.dtype)

    def add_gradient_d(self, hidden_nr: Tensor, dh_nr: Tensor) -> None:
        """Add d's gradient into the slot, by A x and the gradient of d * A x."""
        self.gradient_d_r.add_((hidden_nr * dh_nr).sum(0, dtype=self.gradient_d_r.dtype))
