"""Feedback: measured replica times correct the cost model while training.

Each replica has a slowly changing factor, measured over predicted time. The dispatcher multiplies
the replica's costs by it, so work moves away from a replica that turns out slow, whatever the
reason: a throttled GPU, a noisy neighbour, a layout whose profile was off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

SMOOTHING = 0.4  # weight of the newest step in the logarithmic moving average
LARGEST_CHANGE = math.log(2.0)  # of a factor's logarithm in one step
APPROACH = 0.1  # share of the distance an idle replica's factor moves in a step


@dataclass
class SpeedFeedback:
    """What is known of the replicas' speed.

    Attributes
    ----------
    factors
        Of every replica its measured time over the predicted; 1 until it has been measured.
    counts
        Of every replica how many measurements its factor rests on.
    warm
        Whether a step has been seen: the first of a run is not learned from.
    """

    factors: list[float]
    counts: list[int] = field(default_factory=list)
    warm: bool = False

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * len(self.factors)

    def update(self, predicted_s: Sequence[float], busy_s: Sequence[float]) -> None:
        """Learn from one step.

        Parameters
        ----------
        predicted_s
            Seconds predicted for each replica *without* its factor.
        busy_s
            Seconds each replica really computed.
        """
        if not self.warm:
            self.warm = True
            return
        measured = []
        for replica, (predicted, busy) in enumerate(zip(predicted_s, busy_s, strict=True)):
            if predicted <= 0.0 or busy <= 0.0:
                continue
            measured.append(replica)
            self.counts[replica] += 1
            # A plain mean until the moving average has enough to go on.
            weight = max(SMOOTHING, 1.0 / self.counts[replica])
            change = weight * (math.log(busy / predicted) - math.log(self.factors[replica]))
            # One bad step (a hiccup, a first use of a kernel) must not decide.
            change = max(-LARGEST_CHANGE, min(LARGEST_CHANGE, change))
            self.factors[replica] *= math.exp(change)
        self._approach(measured)

    def _approach(self, measured: list[int]) -> None:
        """Move replicas without work towards the measured ones, so that they are tried again."""
        if not measured:
            return
        middle = median(math.log(self.factors[replica]) for replica in measured)
        for replica in set(range(len(self.factors))) - set(measured):
            old = math.log(self.factors[replica])
            self.factors[replica] = math.exp(old + APPROACH * (middle - old))
