"""Sequences in packed micro-batches of replicas, and what these take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lobra.layout.plan import Plan
from lobra.layout.sequences import IntArray, packed_tokens
from lobra.planner.packed.least_times import Cost


@dataclass(frozen=True, eq=False)
class ReplicaTable:
    """The replicas of a plan.

    Attributes
    ----------
    costs
        Of a micro-batch, in ms, for each group of the plan.
    group, max_tokens
        int64 [replicas]: the group of each, and the most tokens of a micro-batch.
    bubbles
        int64 [replicas]: how many times more the longest micro-batch counts.
    factors
        float64 [replicas]: measured time over the cost's.
    """

    costs: tuple[Cost, ...]
    group: IntArray
    max_tokens: IntArray
    bubbles: IntArray
    factors: np.ndarray

    @classmethod
    def of(cls, plan: Plan, costs: Sequence[Cost], factors: np.ndarray) -> ReplicaTable:
        """Return the replicas of a plan."""
        group = np.repeat(np.arange(len(plan.groups)), [g.replicas for g in plan.groups])
        max_tokens = np.array([g.max_tokens for g in plan.groups])[group]
        bubbles = np.array([g.layout.pp - 1 for g in plan.groups])[group]
        return cls(tuple(costs), group, max_tokens, bubbles, factors)

    def micro_batch_s(
        self, replicas: IntArray, sizes: IntArray, tokens: IntArray, squares: IntArray
    ) -> np.ndarray:
        """Return float64 [k]: what micro-batches on replicas take; nothing where they are empty.

        Of int64 [k] each: see `Filling`.
        """
        times_s, groups = np.zeros(len(replicas)), self.group[replicas]
        for group, cost in enumerate(self.costs):
            own = np.flatnonzero((groups == group) & (sizes > 0))
            if len(own):
                times_s[own] = cost(tokens[own], squares[own])
        return times_s * (self.factors[replicas] / 1000.0)


@dataclass(frozen=True, eq=False)
class Filling:
    """A step's sequences in micro-batches.

    Attributes
    ----------
    batch_of
        int64 [n]: the micro-batch of each sequence.
    replica_of
        int64 [k]: the replica of each micro-batch; one may be empty.
    sizes, sums, squares, tokens
        int64 [k]: sequences, their tokens, the squares of their lengths, and tokens with padding.
    times_s
        float64 [k]: what each micro-batch takes.
    longest_s, replica_time_s
        float64 [replicas]: the longest micro-batch, and all of them with bubbles.
    """

    batch_of: IntArray
    replica_of: IntArray
    sizes: IntArray
    sums: IntArray
    squares: IntArray
    tokens: IntArray
    times_s: np.ndarray
    longest_s: np.ndarray
    replica_time_s: np.ndarray

    @property
    def step_time_s(self) -> float:
        """The slowest replica's time."""
        return float(self.replica_time_s.max())


def filled(
    table: ReplicaTable, lengths: IntArray, batch_of: IntArray, replica_of: IntArray
) -> Filling:
    """Return what micro-batches take when they are filled so."""
    number = len(replica_of)
    sizes = np.bincount(batch_of, minlength=number)
    sums = np.bincount(batch_of, lengths, number).astype(np.int64)
    squares = np.bincount(batch_of, lengths * lengths, number).astype(np.int64)
    tokens = np.where(sizes > 1, packed_tokens(sums), sums)
    times_s = table.micro_batch_s(replica_of, sizes, tokens, squares)
    replicas = len(table.group)
    longest_s = np.zeros(replicas)
    np.maximum.at(longest_s, replica_of, times_s)
    replica_time_s = np.bincount(replica_of, times_s, replicas) + table.bubbles * longest_s
    return Filling(
        batch_of, replica_of, sizes, sums, squares, tokens, times_s, longest_s, replica_time_s
    )
