"""Rates of padded sequences, and the certificate of sampled steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lobra.planner.bucketed.fluid import amounts
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.time_table import TimeTable, time_table
from lobra.planner.certificate import Certificate
from lobra.planner.clock import Clock
from lobra.planner.sampling import Sampled
from lobra.planner.sequence_rates import affine

LIMIT_S = 3.0


@dataclass(frozen=True)
class BucketedRates:
    """What sequences of each bucket, padded to it, cost on one candidate at least."""

    table: TimeTable
    weight: np.ndarray

    @cached_property
    def least_s(self) -> np.ndarray:
        """float64 [R]: seconds of each sequence without any bubble; infinite if it does not fit."""
        return self.table.rate_s()

    @cached_property
    def alone_s(self) -> np.ndarray:
        """float64 [R]: seconds of a replica with nothing else; infinite if it does not fit."""
        return self.table.least_s()

    @property
    def unshared_s(self) -> np.ndarray:
        """float64 [R]: zeros; nothing is known of sequences that share with no other."""
        return np.where(np.isfinite(self.least_s), 0.0, np.inf)

    @property
    def begun_s(self) -> np.ndarray:
        """float64 [0, R]: nothing is known of it."""
        return np.empty((0, len(self.least_s)))

    def after(self, step_s: float) -> tuple[np.ndarray, float]:
        """Return rates, float64 [R], and seconds of bubble, of steps of ``step_s`` or more.

        In t such seconds a replica has at most t less the bubble for sequences at these rates.
        """
        if not self.table.bubbles or not np.isfinite(self.least_s).any():
            return self.least_s, 0.0
        from_s = np.maximum(step_s, self.alone_s)  # when the sequence is possible at all
        number = amounts(self.table, step_s)
        for place in np.flatnonzero(np.isfinite(from_s) & (from_s > step_s)).tolist():
            number[place] = amounts(self.table, float(from_s[place]))[place]
        return affine(self.least_s, from_s, number, step_s, self.weight)


def certified(
    steps: Sequence[np.ndarray], problem: Problem, sampled: Sampled, clock: Clock
) -> float:
    """Return what no plan's mean over the steps is less than, in seconds.

    ``steps`` are int64 [n] each: the buckets that the step's sequences are padded to.
    """
    fleet = problem.fleet
    lengths = np.unique(np.concatenate(steps))
    places = [np.searchsorted(lengths, step) for step in steps]
    counts = np.stack([np.bincount(place, minlength=len(lengths)) for place in places])
    weight = counts.sum(axis=0).astype(np.float64)
    rates = [
        BucketedRates(time_table(c.layout, c.max_tokens, lengths, problem.cost_model), weight)
        for c in fleet.candidates
    ]
    certificate = Certificate(fleet, int(lengths[-1]), counts, rates)
    limit_s = min(LIMIT_S, max(0.0, clock.left_s))
    bound_s = certificate.mean_s(fleet.replicas_of(sampled.plan), Clock(limit_s, processor=True))
    return min(bound_s, sampled.mean_s)
