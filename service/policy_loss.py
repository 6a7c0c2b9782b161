"""Losses of reinforcement learning, as weights of logprobs.

They are of the ratio r = exp(logprob - sampled logprob) of each token and its advantage A:
importance_sampling is the sum of -r A; ppo that of -min(r A, clip(r) A) (arXiv 1707.06347). Their
gradient with respect to a logprob is that of -logprob x weight, for the weight given here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lobra.layout.sequences import FloatArray


@dataclass(frozen=True)
class PolicyLoss:
    """One of the losses; without bounds it is importance_sampling.

    Attributes
    ----------
    low, high
        What ppo clips the ratio to.
    """

    low: float = 0.0
    high: float = float("inf")

    def ratios(self, logprobs: FloatArray, sampled: FloatArray) -> FloatArray:
        """Return each token's ratio."""
        return np.exp(logprobs - sampled)

    def weights(
        self, logprobs: FloatArray, sampled: FloatArray, advantages: FloatArray
    ) -> FloatArray:
        """Return r A where the loss depends on the logprob, 0 where the ratio is clipped."""
        ratios = self.ratios(logprobs, sampled)
        gained = ratios * advantages
        return np.where(gained <= np.clip(ratios, self.low, self.high) * advantages, gained, 0.0)

    def value(self, logprobs: FloatArray, sampled: FloatArray, advantages: FloatArray) -> float:
        """Return the loss."""
        ratios = self.ratios(logprobs, sampled)
        clipped = np.clip(ratios, self.low, self.high) * advantages
        return float(-np.minimum(ratios * advantages, clipped).sum())
