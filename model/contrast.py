"""Contrastive instruction tuning: wordings of one question are to look alike, of others not.

What stands for a sequence is the last layer's state of its last token (arXiv 2402.11138). All pairs
of a step are compared with each other, wherever they are computed: so their states are found first,
and the gradient of the loss by each. In the step's own pass the inner product of a state with its
gradient has just that gradient.

Shape suffixes: B rows, S their tokens, N sequences, n pairs of them, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy


@dataclass(frozen=True, eq=False)
class Contrast:
    """The contrast of all pairs of a task in a step.

    Attributes
    ----------
    loss
        As it is.
    weight
        What it counts for beside the mean loss of the tokens.
    gradient_ND
        Of both together, by every state.
    """

    loss: float
    weight: float
    gradient_ND: Tensor


@dataclass(frozen=True, eq=False)
class Pull:
    """Of some of a micro-batch's sequences the places of their last tokens, and the gradients."""

    places_N: Tensor
    gradient_ND: Tensor

    def loss(self, hidden_BSD: Tensor) -> Tensor:
        """Return a number with these gradients by the states."""
        states_ND = hidden_BSD.flatten(0, 1).index_select(0, self.places_N)
        return (states_ND.to(self.gradient_ND.dtype) * self.gradient_ND).sum()


def contrastive_loss(states_ND: Tensor, temperature: float) -> Tensor:
    """Return the loss of pairs whose states alternate.

    Each one's partner is to be told from all others' by its cosine, divided by the temperature:
    the mean cross-entropy, from one side and from the other.
    """
    one_n1D, other_1nD = states_ND[0::2].unsqueeze(1), states_ND[1::2].unsqueeze(0)
    likeness_nn = cosine_similarity(one_n1D, other_1nD, dim=2) / temperature
    partners_n = torch.arange(len(likeness_nn), device=states_ND.device)
    sides = cross_entropy(likeness_nn, partners_n) + cross_entropy(likeness_nn.T, partners_n)
    return sides / 2


def contrast(
    states_ND: Tensor, temperature: float, most_weight: float, token_loss: float
) -> Contrast:
    """Return the contrast of pairs whose states alternate.

    It counts for ``most_weight``, but no more than makes it as large as ``token_loss``.
    """
    leaf_ND = states_ND.detach().requires_grad_()
    with torch.enable_grad():
        loss = contrastive_loss(leaf_ND, temperature)
        (gradient_ND,) = torch.autograd.grad(loss, leaf_ND)
    weight = min(most_weight, token_loss / loss.item()) if loss.item() > 0 else most_weight
    return Contrast(loss.item(), weight, weight * gradient_ND)
