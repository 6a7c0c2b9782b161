"""Feedback: measured replica times correct the cost model while training.

Each replica has a slowly changing factor, measured over predicted time. The dispatcher multiplies
the replica's costs by it, so work moves away from a replica that turns out slow, whatever the
reason: a throttled GPU, a noisy neighbour, a layout whose profile was off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

SMOOTHING = 0.4  # weight of the newest step in the logarithmic moving average
WARM_UP_STEPS = 1  # the first step also pays for lazy initialisation
LARGEST_FACTOR = 1000.0


@dataclass
class SpeedFeedback:
    """The factor of each replica; 1 until it has been measured."""

    factors: list[float]
    observed: int = 0
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * len(self.factors)

    def update(self, predicted_s: Sequence[float], busy_s: Sequence[float]) -> None:
        """Learn from one step.

        Args:
            predicted_s: seconds predicted for each replica *without* its factor.
            busy_s: seconds each replica really computed.
        """
        self.observed += 1
        if self.observed <= WARM_UP_STEPS:
            return
        for replica, (predicted, busy) in enumerate(zip(predicted_s, busy_s, strict=True)):
            if predicted <= 0.0 or busy <= 0.0:
                continue  # it had no work: nothing was learnt
            ratio = min(max(busy / predicted, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
            self.counts[replica] += 1
            # A plain mean until the moving average has enough to go on.
            weight = max(SMOOTHING, 1.0 / self.counts[replica])
            old = math.log(self.factors[replica])
            self.factors[replica] = math.exp(old + weight * (math.log(ratio) - old))
