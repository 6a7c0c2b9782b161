"""Dispatch of packed steps: longest processing time over replicas, then first fit decreasing.

A micro-batch of T tokens whose lengths' squares add up to Q takes f(T, Q), which is nearly linear.
So a sequence's part of it hardly depends on what it is packed with, and replicas are balanced by
the parts of full micro-batches before these are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import islice

import numpy as np

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import Plan
from lobra.layout.sequences import PACKED_MULTIPLE, IntArray, packed_tokens
from lobra.planner.assignment import Assignment, Rows
from lobra.planner.step_time import pipeline_time
from lobra.profiler.cost_model import CostModel

#: Milliseconds of micro-batches, float64 [k], from their tokens and squares of lengths, int64 [k]
#: each; monotone in both.
Cost = Callable[[IntArray, IntArray], np.ndarray]


def packed_costs(plan: Plan, cost_model: CostModel) -> list[Cost]:
    """Return what a packed micro-batch takes on each group of a plan."""

    def cost_on(layout: Layout) -> Cost:
        return lambda tokens, squares: cost_model.micro_batch_time(layout, tokens, squares).total_ms

    return [cost_on(group.layout) for group in plan.groups]


def dispatch_packed(
    lengths: Sequence[int] | IntArray,
    plan: Plan,
    costs: Sequence[Cost],
    *,
    slowdown: Sequence[float] | None = None,
    sync_time_s: float = 0.0,
) -> Assignment:
    """Assign every sequence to a packed micro-batch of one replica.

    Parameters
    ----------
    lengths
        int [n]: tokens of the step's sequences.
    plan
        What runs.
    costs
        What a micro-batch takes on each group of the plan.
    slowdown
        Per replica, in plan order: its measured time over the cost's (1: as modelled).
    sync_time_s
        What synchronising the adapters adds after the slowest replica.

    Returns
    -------
    Every sequence exactly once, no more than ``max_tokens`` tokens in a micro-batch, padding
    included. The result is a function of the arguments alone, bit for bit.

    Raises
    ------
    ConfigError
        If there is no sequence, or one is too long for every replica.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        raise ConfigError("dispatch: there is no sequence")
    if lengths.max() > plan.max_tokens:
        raise ConfigError(
            f"dispatch: a sequence of {lengths.max()} tokens fits no replica of the plan {plan}, "
            f"whose largest holds {plan.max_tokens} tokens; plan for that length or lower the "
            f"context length"
        )
    factors = np.ones(len(plan.replicas)) if slowdown is None else np.asarray(slowdown, float)
    micro_batches: list[tuple[Rows, ...]] = []
    times_s: list[float] = []
    sizes = lengths.tolist()
    taken = iter(_by_replica(lengths, plan, costs, factors))
    for group, cost in zip(plan.groups, costs, strict=True):
        for sequences in islice(taken, group.replicas):
            batches = _first_fit(sequences, sizes, group.max_tokens)
            tokens, squares = _work(batches, lengths)
            times_ms = cost(tokens, squares)
            slowest_first = np.argsort(-times_ms, kind="stable").tolist()
            micro_batches.append(
                tuple(Rows(np.array(batches[batch]), int(tokens[batch])) for batch in slowest_first)
            )
            factor = float(factors[len(times_s)])
            times_s.append(pipeline_time(times_ms.tolist(), group.layout.pp) * factor / 1000.0)
    bound_s = min(_longest_alone_s(lengths, plan, costs, factors), max(times_s))
    return Assignment(tuple(micro_batches), np.array(times_s), bound_s, sync_time_s)


@dataclass(frozen=True, eq=False)
class _Alike:
    """Replicas that take as long for the same, the one with the least work first.

    ``part_s`` are the seconds of a sequence of each length, a part of a full micro-batch, infinite
    where it does not fit. The longest micro-batch, at most ``full_s``, counts ``bubbles`` times
    more. ``least`` is a heap of (seconds of work, replica).
    """

    part_s: list[float]
    full_s: float
    bubbles: int
    least: list[tuple[float, int]]

    def end_s(self, length: int) -> float:
        """Return when the replica with the least work ends with one more of the length."""
        work_s = self.least[0][0] + self.part_s[length]
        return work_s + self.bubbles * min(work_s, self.full_s)

    def take(self, length: int) -> int:
        """Give one more of the length to the replica with the least work; return which it is."""
        work_s, replica = self.least[0]
        heapreplace(self.least, (work_s + self.part_s[length], replica))
        return replica


def _by_replica(
    lengths: IntArray, plan: Plan, costs: Sequence[Cost], factors: np.ndarray
) -> list[list[int]]:
    """Return each replica's sequences: the longest goes first, each to where it ends first."""
    distinct, length_of = np.unique(lengths, return_inverse=True)
    alike = _alike_replicas(distinct, lengths, plan, costs, factors)
    taken: list[list[int]] = [[] for _ in plan.replicas]
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(length_of[index])
        taken[min(alike, key=lambda some: some.end_s(length)).take(length)].append(index)
    return taken


def _alike_replicas(
    distinct: IntArray, lengths: IntArray, plan: Plan, costs: Sequence[Cost], factors: np.ndarray
) -> list[_Alike]:
    """Return the replicas by group and factor, all without work."""
    mean_length = (lengths**2).sum() / lengths.sum()  # of the sequence a token is from
    alike, start = [], 0
    for group, cost in zip(plan.groups, costs, strict=True):
        sizes = np.maximum(group.max_tokens // distinct, 1)
        part_ms = cost(sizes * distinct, sizes * distinct**2) / sizes
        part_ms = np.where(distinct <= group.max_tokens, part_ms, np.inf)
        full = np.array([[group.max_tokens], [int(group.max_tokens * mean_length)]])
        full_ms = float(cost(*full)[0])
        replicas = np.arange(start, start + group.replicas)
        for factor in np.unique(factors[replicas]).tolist():
            least = [(0.0, index) for index in replicas[factors[replicas] == factor].tolist()]
            part_s = (part_ms * factor / 1000.0).tolist()
            bubbles = group.layout.pp - 1
            alike.append(_Alike(part_s, full_ms * factor / 1000.0, bubbles, least))
        start += group.replicas
    return alike


def _first_fit(sequences: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Return micro-batches of the sequences, each in the first it fits into; longest first.

    Several sequences are padded to a multiple, which must fit too; one alone is not.
    """
    max_tokens -= max_tokens % PACKED_MULTIPLE
    batches: list[list[int]] = []
    free: list[int] = []
    for index in sequences:
        length = lengths[index]
        batch = next((number for number, room in enumerate(free) if room >= length), None)
        if batch is None:
            batches.append([index])
            free.append(max_tokens - length)
        else:
            batches[batch].append(index)
            free[batch] -= length
    return batches


def _work(batches: list[list[int]], lengths: IntArray) -> tuple[IntArray, IntArray]:
    """Return the tokens, padding included, and the squares of lengths of micro-batches."""
    tokens = np.array([lengths[batch].sum() for batch in batches], dtype=np.int64)
    squares = np.array([(lengths[batch] ** 2).sum() for batch in batches], dtype=np.int64)
    is_padded = np.array([len(batch) > 1 for batch in batches], dtype=bool)
    return np.where(is_padded, packed_tokens(tokens), tokens), squares


def _longest_alone_s(
    lengths: IntArray, plan: Plan, costs: Sequence[Cost], factors: np.ndarray
) -> float:
    """Return the time of the sequence that takes longest, alone on the best replica."""
    distinct = np.unique(lengths)
    least_s = np.full(len(distinct), np.inf)
    start = 0
    for group, cost in zip(plan.groups, costs, strict=True):
        factor = factors[start : start + group.replicas].min()
        alone_ms = cost(distinct, distinct**2) * group.layout.pp * factor
        fits = distinct <= group.max_tokens
        least_s = np.where(fits, np.minimum(least_s, alone_ms / 1000.0), least_s)
        start += group.replicas
    return float(least_s.max())
