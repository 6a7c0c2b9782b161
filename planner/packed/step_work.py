"""The sequences of a step as kinds of replicas see them: parts of time, and what these hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lobra.layout.plan import Plan
from lobra.layout.sequences import IntArray
from lobra.planner.packed.filling import ReplicaTable
from lobra.planner.packed.least_times import Cost
from lobra.planner.packed.minorant import Minorant, minorant_of
from lobra.planner.prices import class_starts

# Minorants are made for mean lengths, and micro-batches' tokens, of these ratios: they are few.
MEAN_RATIO, TOKENS_RATIO = 1.5, 1.2
CROWDED = 0.6  # of a kind's tokens: room for more in micro-batches with one that needs its own
LEAST_MS = 1e-9  # of a token, where a cost does not grow with tokens


@dataclass(frozen=True, eq=False)
class ReplicaKind:
    """Replicas of a plan that take as long for the same.

    Attributes
    ----------
    replicas
        int64 [r]: which of the plan's replicas they are.
    max_tokens
        The most of a micro-batch.
    minorant
        What their micro-batches take at least.
    bubbles
        How many times more the longest micro-batch counts: pp - 1.
    factor
        Their measured time over the cost's.
    """

    replicas: IntArray
    max_tokens: int
    minorant: Minorant
    bubbles: int
    factor: float

    def held_s(self, step_time_s: float, most: int) -> tuple[float, float]:
        """Return the most seconds of parts that one replica can take in a step of so many seconds.

        And the seconds that each of its micro-batches, at most ``most``, then takes.
        """
        if not self.bubbles:
            return step_time_s, step_time_s
        start_s = self.minorant.start_ms / 1000.0 * self.factor
        share = max(self.minorant.marginal_share, 1e-9)
        # of m micro-batches: the least of w = t m / (m + bubbles) and (w - start m) / share, which
        # rise up to these m
        best = math.inf
        if start_s > 0.0:
            most_marginal = math.sqrt(step_time_s * self.bubbles / start_s) - self.bubbles
            best = max(1.0, most_marginal, (1.0 - share) * step_time_s / start_s - self.bubbles)
        held_s, each_s = 0.0, step_time_s / (1 + self.bubbles)
        for number in {math.floor(best), math.ceil(best)} if best < most else {most}:
            own_s = step_time_s / (number + self.bubbles)
            work_s = own_s * number
            one_s = min(work_s, (work_s - start_s * number) / share)
            if one_s > held_s:
                held_s, each_s = one_s, own_s
        return held_s, each_s


@dataclass(frozen=True, eq=False)
class StepWork:
    """The sequences of a step as replicas see them.

    Attributes
    ----------
    lengths, counts
        int64 [J]: the different lengths, ascending, and how many sequences have them.
    kinds
        The G kinds of replicas.
    parts_s, alone_s
        float64 [G, J]: a sequence's part of its replica's time, and what a micro-batch of it alone
        takes; infinite where it does not fit.
    """

    lengths: IntArray
    counts: IntArray
    kinds: tuple[ReplicaKind, ...]
    parts_s: np.ndarray
    alone_s: np.ndarray

    @cached_property
    def parts_of_classes_s(self) -> np.ndarray:
        """float64 [G, classes]: parts of all sequences, in classes of lengths held by the same."""
        starts = class_starts(np.isfinite(self.parts_s))
        return np.add.reduceat(self.counts * self.parts_s, starts, axis=1)

    @property
    def whole_s(self) -> float:
        """Seconds of the sequence that takes longest, alone on the replica best for it."""
        stages = np.array([[1 + kind.bubbles] for kind in self.kinds])
        return float((self.alone_s * stages).min(axis=0).max())

    def worth(self, prices: np.ndarray) -> float:
        """Return what all sequences cost at prices of the kinds' time, float64 [G], at least."""
        return float(self.counts @ (prices[:, None] * self.parts_s).min(axis=0))

    def with_whole_starts(self, prices: np.ndarray) -> StepWork:
        """Return the work with whole starts for sequences of which a micro-batch holds only one.

        Of kinds for which so many of them are cheapest, at prices (float64 [G]) of the kinds' time,
        that the others hardly fill up the micro-batches they begin. Not of pipelines, whose
        micro-batches are seldom full.
        """
        cheapest = (prices[:, None] * self.parts_s).argmin(axis=0)
        parts_s = self.parts_s.copy()
        for place, kind in enumerate(self.kinds):
            counts = np.where(cheapest == place, self.counts, 0)
            alone = (2 * self.lengths > kind.max_tokens) & np.isfinite(parts_s[place])
            room = int(counts[alone].sum()) * kind.max_tokens
            if kind.bubbles or room <= CROWDED * (counts @ self.lengths):
                continue
            whole_ms = kind.minorant.start_ms + kind.minorant.marginal_ms(self.lengths[alone])
            whole_s = whole_ms / 1000.0 * kind.factor
            parts_s[place, alone] = np.maximum(parts_s[place, alone], whole_s)
        return replace(self, parts_s=parts_s)

    def up_to(self, kind: int, number: int) -> StepWork:
        """Return the work of which one kind takes only so many of the lengths, the shortest."""
        parts_s = self.parts_s.copy()
        parts_s[kind, number:] = np.inf
        return replace(self, parts_s=parts_s)

    def held_s(self, step_time_s: float) -> np.ndarray:
        """Return float64 [G]: the most seconds of parts that all replicas of a kind can take.

        In a step of so many seconds. If only one kind holds the longest sequence, one of these has
        its bubbles.
        """
        most = int(self.counts.sum())
        held_s = np.array([kind.held_s(step_time_s, most)[0] for kind in self.kinds])
        of_all_s = held_s * [len(kind.replicas) for kind in self.kinds]
        holding = np.flatnonzero(np.isfinite(self.alone_s[:, -1]))
        if len(holding) == 1:
            only = int(holding[0])
            bubbles_s = self.kinds[only].bubbles * float(self.alone_s[only, -1])
            of_all_s[only] -= held_s[only] - min(held_s[only], max(0.0, step_time_s - bubbles_s))
        return of_all_s


def minorants_of(plan: Plan, costs: Sequence[Cost], lengths: IntArray) -> tuple[Minorant, ...]:
    """Return the minorant of each group's cost, near for such micro-batches as it may take.

    These are full, but of pipelines as large as is best for a share of the tokens.
    """
    minorants = []
    for group, cost in zip(plan.groups, costs, strict=True):
        own = lengths[lengths <= group.max_tokens]
        mean = float((own**2).sum() / own.sum()) if len(own) else 1.0
        mean = MEAN_RATIO ** np.round(np.log(mean) / np.log(MEAN_RATIO))
        tokens = group.max_tokens
        if group.layout.pp > 1 and len(own):
            share = own.sum() * group.layout.num_gpus / plan.num_gpus
            number = np.arange(max(1.0, share // tokens), len(own) + 1)
            size = np.minimum(share / number, tokens).astype(np.int64) + 1
            times_ms = (number + group.layout.pp - 1) * cost(size, size * int(mean))
            less = np.log(min(size[times_ms.argmin()], tokens) / tokens) / np.log(TOKENS_RATIO)
            tokens = int(tokens * TOKENS_RATIO ** np.round(less))
        minorants.append(minorant_of(cost, group.max_tokens, max(1, tokens), max(1, int(mean))))
    return tuple(minorants)


def step_work(
    table: ReplicaTable, plan: Plan, minorants: Sequence[Minorant], lengths: IntArray
) -> tuple[StepWork, IntArray]:
    """Return the step's work, and int64 [n]: which of its lengths each sequence has."""
    distinct, length_of, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    kinds, parts_s, alone_s = [], [], []
    for group, (own, minorant, cost) in enumerate(
        zip(plan.groups, minorants, table.costs, strict=True)
    ):
        replicas = np.flatnonzero(table.group == group)
        fits = distinct <= own.max_tokens
        if not fits.any():
            continue
        part_s = np.maximum(minorant.part_ms(distinct), LEAST_MS * distinct) / 1000.0
        part_s = np.where(fits, part_s, np.inf)
        alone = np.where(fits, cost(distinct, distinct**2), np.inf) / 1000.0
        for factor in np.unique(table.factors[replicas]).tolist():
            same = replicas[table.factors[replicas] == factor]
            bubbles = own.layout.pp - 1
            kinds.append(ReplicaKind(same, own.max_tokens, minorant, bubbles, factor))
            parts_s.append(part_s * factor)
            alone_s.append(alone * factor)
    work = StepWork(distinct, counts, tuple(kinds), np.stack(parts_s), np.stack(alone_s))
    return work, length_of
