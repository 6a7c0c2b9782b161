"""Part of a micro-batch: tokens that go through the same factors, and what is computed with them.

Shape suffixes: n tokens of a part, i and o input and output features of this rank's shard, r ranks
of a linear's A, R rows of A or B: ranks of several tasks and linears, one below the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest

import torch
from torch import Tensor

from lobra.model.base_linear import BaseLinear
from lobra.model.dropout import InputDropout
from lobra.model.magnitude import Magnitude
from lobra.model.vera import Vectors


@dataclass(frozen=True)
class Rows:
    """A, or a linear's B, of one task or several, cut to the shard, in the activations' dtype.

    It is the rows `taken` of `matrix_Rf`; None: all of them. `gradients` are views into slots, one
    below the other like those rows.
    """

    matrix_Rf: Tensor
    gradients: tuple[Tensor, ...]
    taken: Tensor | None = None

    def weights_Rf(self) -> Tensor:
        """Return the rows. Where they must be gathered, they are only as long as one needs them."""
        return self.matrix_Rf if self.taken is None else self.matrix_Rf.index_select(0, self.taken)


@dataclass(frozen=True)
class Outputs:
    """The way from x A^T to one linear of a stack: its `columns`, times B; DoRA's magnitude."""

    linear: int
    columns: slice
    B: Rows
    magnitude: Magnitude | None = None

    def unscaled(self, base: BaseLinear, x_ni: Tensor, h_nR: Tensor) -> Tensor:
        """Return what a magnitude scales: W x + s B A x, without bias."""
        return base.product(x_ni).addmm_(h_nR[:, self.columns], self.B.weights_Rf())


@dataclass(frozen=True)
class Factors:
    """A of all linears of a stack, one below the other, and each one's B."""

    A: Rows
    outputs: tuple[Outputs, ...]


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a micro-batch, and the factors all of them go through.

    Attributes
    ----------
    tokens
        Which tokens.
    factors
        Of all tasks that these are of.
    scaling
        What x A^T is multiplied by: [R], or [n, R], 0 where a row is not of a token's task.
    vectors
        VeRA's of the only output: then `scaling` is d.
    drops
        Whether dropout is before it, if the task has any.
    dropouts
        For each of the factors' outputs what drops out of x; none where nothing does.
    """

    tokens: slice
    factors: Factors
    scaling: Tensor
    vectors: Vectors | None = None
    drops: bool = True
    dropouts: tuple[InputDropout, ...] = ()

    @property
    def has_magnitudes(self) -> bool:
        """Whether its outputs are scaled, as DoRA's are."""
        return self.factors.outputs[0].magnitude is not None

    def hidden(self, x_ni: Tensor) -> Tensor:
        """Return the scaled x A^T, [n, R]."""
        return self._unscaled_hidden(x_ni).mul_(self.scaling)

    def _unscaled_hidden(self, x_ni: Tensor) -> Tensor:
        A_Ri = self.factors.A.weights_Rf()
        if not self.dropouts:
            return x_ni @ A_Ri.t()
        h_nR = x_ni.new_empty(len(x_ni), len(A_Ri))
        for output, dropout in self._outputs():
            left_ni = _left(x_ni, dropout)
            torch.mm(left_ni, A_Ri[output.columns].t(), out=h_nR[:, output.columns])
        return h_nR

    def _outputs(self) -> Iterator[tuple[Outputs, InputDropout | None]]:
        """Yield each output and what drops out of its input."""
        return zip_longest(self.factors.outputs, self.dropouts)

    def add_update(
        self, bases: Sequence[BaseLinear], x_ni: Tensor, h_nR: Tensor, ys_no: Sequence[Tensor]
    ) -> None:
        """Add the updates to the base products in place, by the input and its `hidden`."""
        for output in self.factors.outputs:
            h_nr, B_Ro = h_nR[:, output.columns], output.B.weights_Rf()
            if self.vectors is None:
                ys_no[output.linear].addmm_(h_nr, B_Ro)
            else:
                self.vectors.add_to(ys_no[output.linear], h_nr @ B_Ro)
        if self.has_magnitudes:
            for output, dropout in self._outputs():
                y_no, base = ys_no[output.linear], bases[output.linear]
                if dropout is not None:
                    unscaled_no = output.unscaled(base, dropout.left_of(x_ni), h_nR)
                else:
                    unscaled_no = y_no if base.bias is None else y_no - base.bias
                assert output.magnitude is not None
                y_no.add_(unscaled_no * output.magnitude.excess_o)

    def add_gradients(
        self, bases: Sequence[BaseLinear], x_ni: Tensor, h_nR: Tensor, dys_no: list[Tensor],
        dx_ni: Tensor | None,
    ) -> None:  # fmt: skip
        """Add the gradients of what is trained into the slots and, if it is wanted, x's to `dx_ni`.

        That of the base products is there already.
        """
        if self.has_magnitudes:
            dys_no = self._scaled_back(bases, x_ni, h_nR, dys_no, dx_ni)
        if self.vectors is not None:
            (output,) = self.factors.outputs
            product_no = h_nR @ output.B.weights_Rf()
            back_no = self.vectors.back(dys_no[output.linear], product_no)
            dys_no = [*dys_no[: output.linear], back_no, *dys_no[output.linear + 1 :]]
        self._add_gradients_of_factors(x_ni, h_nR, dys_no, dx_ni)

    def _scaled_back(
        self, bases: Sequence[BaseLinear], x_ni: Tensor, h_nR: Tensor, dys_no: list[Tensor],
        dx_ni: Tensor | None,
    ) -> list[Tensor]:  # fmt: skip
        """Return the gradients of unscaled outputs; add those of the magnitudes.

        What the base's product has beyond its plain gradient is added to ``dx_ni``.
        """
        found = list(dys_no)
        for output, dropout in self._outputs():
            dy_no, base, magnitude = dys_no[output.linear], bases[output.linear], output.magnitude
            assert magnitude is not None
            magnitude.add_gradient(dy_no, output.unscaled(base, _left(x_ni, dropout), h_nR))
            excess_no = dy_no * magnitude.excess_o
            found[output.linear] = dy_no + excess_no
            if dx_ni is not None:
                more_ni = base.input_gradient(excess_no, None)
                dx_ni.add_(_left(more_ni, dropout))
        return found

    def _add_gradients_of_factors(
        self, x_ni: Tensor, h_nR: Tensor, dys_no: Sequence[Tensor], dx_ni: Tensor | None
    ) -> None:
        A, outputs = self.factors.A, self.factors.outputs
        dh_nR = torch.empty_like(h_nR)
        for output in outputs:
            B_Ro = output.B.weights_Rf()
            torch.mm(dys_no[output.linear], B_Ro.t(), out=dh_nR[:, output.columns])
        if self.vectors is not None:
            self.vectors.add_gradient_d(self._unscaled_hidden(x_ni), dh_nR)
        dh_nR.mul_(self.scaling)
        owed: list[tuple[Tensor, Tensor]] = []
        for output in outputs:
            owed += _add_product(output.B.gradients, h_nR[:, output.columns], dys_no[output.linear])
        A_Ri = A.weights_Rf()
        if not self.dropouts:
            owed += _add_product(A.gradients, dh_nR, x_ni)
            if dx_ni is not None:
                dx_ni.addmm_(dh_nR, A_Ri)
        else:
            for output, dropout in zip(outputs, self.dropouts, strict=True):
                dh_nr = dh_nR[:, output.columns]
                if A.gradients:
                    gradients = _of_rows(A.gradients, output.columns)
                    owed += _add_product(gradients, dh_nr, dropout.left_of(x_ni))
                if dx_ni is not None:
                    dropout.add_left(dx_ni, dh_nr @ A_Ri[output.columns])
        if owed:
            torch._foreach_add_(*map(list, zip(*owed, strict=True)))

    def frozen(self) -> Part:
        """Return the part with the opposite sign and without gradients."""
        outputs = tuple(
            replace(output, B=replace(output.B, gradients=())) for output in self.factors.outputs
        )
        factors = Factors(replace(self.factors.A, gradients=()), outputs)
        return replace(self, factors=factors, scaling=-self.scaling, drops=False)


def _left(x_ni: Tensor, dropout: InputDropout | None) -> Tensor:
    return x_ni if dropout is None else dropout.left_of(x_ni)


def _of_rows(gradients: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """Return the gradients of some rows, which no gradient crosses but an only one."""
    if len(gradients) == 1:
        return [gradients[0][rows]]
    starts = accumulate((len(gradient) for gradient in gradients), initial=0)
    return [
        gradient
        for gradient, start in zip(gradients, starts, strict=False)
        if rows.start <= start < rows.stop
    ]


def _add_product(
    gradients: Sequence[Tensor], left_nR: Tensor, right_nf: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Add left^T right to the gradients, or return what is to be added to which."""
    if not gradients:
        return []
    left_Rn, kept = left_nR.t(), gradients[0].dtype
    if len(gradients) == 1 and kept == left_nR.dtype:
        gradients[0].addmm_(left_Rn, right_nf)
        return []
    if kept != left_nR.dtype and left_nR.is_cuda:
        return _cut(torch.mm(left_Rn, right_nf, out_dtype=kept), gradients)
    return _cut(left_Rn @ right_nf, gradients)


def _cut(rows_Rf: Tensor, gradients: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the gradients, each with the rows that are its own."""
    rows = rows_Rf.split([len(gradient) for gradient in gradients])
    return list(zip(gradients, rows, strict=True))
