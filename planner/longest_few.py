"""What steps take at least since their few longest sequences cannot be divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lobra.planner.sequence_rates import SequenceRates

NUMBERS = (1, 2, 3, 4, 6)  # of longest sequences that are looked at
TINY = 1e-300
ROUNDING = 1e-6  # relative: a replica that is later by less has not ended later


@dataclass(frozen=True, eq=False)
class LongestFew:
    """The longest sequences of K steps on C candidates.

    Attributes
    ----------
    alone_s, work_s
        float64 [numbers, C, K]: of the shortest of so many longest sequences, what a replica with
        nothing else takes and what it adds to others; 0 where a step has fewer.
    """

    alone_s: np.ndarray
    work_s: np.ndarray

    @classmethod
    def of(cls, rates: Sequence[SequenceRates], counts: np.ndarray) -> LongestFew:
        """Return them for steps with so many sequences of each length, int64 [K, D], ascending."""
        alone_s = np.stack([one.alone_s for one in rates])
        work_s = np.stack([np.maximum(one.least_s, one.unshared_s) for one in rates])
        at_least = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]  # as long, or longer
        places = [(at_least >= number).sum(axis=1) - 1 for number in NUMBERS]
        return cls(
            np.stack([np.where(place < 0, 0.0, alone_s[:, place]) for place in places]),
            np.stack([np.where(place < 0, TINY, work_s[:, place]).clip(TINY) for place in places]),
        )

    def steps_s(self, replicas: np.ndarray) -> np.ndarray:
        """Return float64 [K]: the least times in which a plan's replicas take them, each whole.

        ``replicas`` is int64 [C]. All of so many take as long as the shortest of them, at least.
        """
        used = replicas > 0
        number_of = replicas[used][:, None]
        found_s = np.zeros(self.work_s.shape[2])
        for number, every_alone_s, every_work_s in zip(
            NUMBERS, self.alone_s, self.work_s, strict=True
        ):
            alone_s, work_s = every_alone_s[used], every_work_s[used]
            times = np.arange(1, number + 1)[:, None, None]
            end_s = np.concatenate([alone_s[None], work_s * times]).reshape(-1, len(found_s))
            until_s = end_s[:, None] * (1 + ROUNDING)
            with np.errstate(invalid="ignore"):  # what does not fit
                done = np.where(until_s >= alone_s, np.floor(until_s / work_s), 0.0)
                enough = (done * number_of).sum(axis=1) >= number
            found_s = np.maximum(found_s, np.where(enough, end_s, np.inf).min(axis=0))
        return found_s
