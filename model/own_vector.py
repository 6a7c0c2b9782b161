"""A vector of the base, a norm's weight or a bias, that tasks may have a trained one of instead.

On a task's tokens its own takes the place of the base's. Where all ranks of a tensor-parallel group
compute the same with it, each has the whole gradient: their mean is taken, not their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lobra.model.arranged import Arranged, trained_view
from lobra.model.memory_policy import trains
from lobra.model.slot import Slot
from lobra.model.token_tasks import Selection


class OwnVector(Arranged):
    """Which tasks have a vector of their own in place of one of the base, and those vectors."""

    def __init__(
        self, name: str, selection: Selection, features: range | None = None, num_copies: int = 1
    ) -> None:
        """Stand for the vector with this name in the checkpoint.

        Parameters
        ----------
        name
            The base's.
        selection
            Whose the tokens are.
        features
            Those that this rank has; None: all.
        num_copies
            Ranks that compute the same with it.
        """
        super().__init__()
        self.name = name
        self.selection = selection
        self.features = slice(None) if features is None else slice(features.start, features.stop)
        self.num_copies = num_copies
        self.own: dict[int, Tensor] = {}

    def arrange(self, slots: Mapping[int, Slot]) -> None:
        """Compute with the vectors in these slots from now on."""
        self.own = {}
        for number, slot in slots.items():
            if tensor := slot.layout.of_base.get(self.name):
                weights, gradient = (
                    slot.layout.rows(flat, tensor)[0, self.features]
                    for flat in (slot.weights, slot.gradient)
                )
                self.own[number] = trained_view(weights, gradient, self.num_copies)

    def replaced(
        self,
        x: Tensor,
        with_own: Callable[[Tensor, Tensor], Tensor],
        plain: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return `plain(x)`, on the tokens of tasks with a vector of their own `with_own`.

        x is [B, S, ...]; both functions work token by token. Without ``plain`` it is x itself.
        """
        segments = self.selection.tasks.segments
        if not any(segment.number in self.own for segment in segments):
            return x if plain is None else plain(x)
        trains()
        x_N, pieces = x.flatten(0, 1), []
        for segment in segments:
            piece = x_N[segment.start : segment.stop]
            if segment.number in self.own:
                piece = with_own(piece, self.own[segment.number])
            elif plain is not None:
                piece = plain(piece)
            pieces.append(piece)
        return torch.cat(pieces).view(x.shape)


class OwnNorm(nn.Module):
    """A norm of which tasks may have a weight of their own.

    `heads_first`: it is of [B, heads, S, ...].
    """

    def __init__(self, norm: nn.Module, own_weight: OwnVector, heads_first: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.own_weight = own_weight
        self.heads_first = heads_first

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x, of the same shape."""
        if not self.own_weight.own:
            normed: Tensor = self.norm(x)
            return normed
        if self.heads_first:
            x = x.transpose(1, 2)
        normed = self.own_weight.replaced(x, self._with_own, self.norm)
        return normed.transpose(1, 2) if self.heads_first else normed

    def _with_own(self, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(self.norm.weight.dtype)  # type: ignore[arg-type]
        normed: Tensor = functional_call(self.norm, {"weight": weight}, (x,))
        return normed
