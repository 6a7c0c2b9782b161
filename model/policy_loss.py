"""The loss of tokens that a policy sampled, by how good they were (arXiv 1707.06347, equation 7).

Of each token it is -min(r A, clip(r) A): A its advantage, r = exp(logprob now - logprob when it was
sampled). Without bounds of the clipping it is importance sampling's, -r A.

Shape suffixes: P tokens to be predicted, R those of them that were sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def policy_losses(
    logprobs_R: Tensor,
    sampled_R: Tensor,
    advantages_R: Tensor,
    low: Tensor | float,
    high: Tensor | float,
) -> Tensor:
    """Return each token's loss [R].

    Parameters
    ----------
    logprobs_R, sampled_R
        Its logprob now, and when it was sampled.
    advantages_R
        How much better it was than expected.
    low, high
        What the ratio is clipped to: of all, or of each.
    """
    ratios_R = torch.exp(logprobs_R - sampled_R)
    bounds = (torch.as_tensor(one, dtype=torch.float64).to(ratios_R) for one in (low, high))
    clipped_R = torch.clamp(ratios_R, *bounds)
    return -torch.minimum(ratios_R * advantages_R, clipped_R * advantages_R)


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Those targets of a micro-batch that were sampled.

    `places_R` (int64) are theirs among the targets; the rest are arguments of `policy_losses`.
    """

    places_R: Tensor
    sampled_R: Tensor
    advantages_R: Tensor
    low_R: Tensor
    high_R: Tensor

    def learned(self, losses_P: Tensor) -> Tensor:
        """Return the losses [P] that are learned, of the targets' cross-entropies [P]."""
        own_R = policy_losses(
            -losses_P.index_select(0, self.places_R),
            self.sampled_R,
            self.advantages_R,
            self.low_R,
            self.high_R,
        )
        return losses_P.index_copy(0, self.places_R, own_R)
