"""What in a model computes with the slots of tasks and is told when there are others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from lobra.model.slot import Slot


class Arranged(nn.Module, ABC):
    """A module that computes with tensors of the tasks' slots."""

    @abstractmethod
    def arrange(self, slots: Mapping[int, Slot]) -> None:
        """Compute with the tensors in these slots from now on."""


def trained_view(weights: Tensor, gradient: Tensor, num_copies: int = 1) -> Tensor:
    """Return a view of a slot's weights whose gradient autograd adds into the slot's.

    Where ``num_copies`` ranks compute the same with it, each adds its share, so that their sum is
    the gradient.
    """
    view = weights.detach().requires_grad_()
    view.grad = gradient
    if num_copies > 1:
        view.register_hook(lambda whole: whole / num_copies)
    return view
