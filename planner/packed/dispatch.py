"""Dispatch of packed steps: sequences to replicas, micro-batches, local search, and a bound.

A micro-batch of T tokens whose lengths' squares add up to Q takes f(T, Q), which is nearly linear.
So a sequence's part of it hardly depends on what it is packed with, and replicas are balanced by
these parts before micro-batches are made, then by what these really take.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import Plan
from lobra.layout.sequences import IntArray
from lobra.planner.assignment import Assignment, Rows
from lobra.planner.packed.bound import crowded_s, least_time_s, prices_of
from lobra.planner.packed.bubbles import without_long_bubbles
from lobra.planner.packed.filling import Filling, ReplicaTable, filled
from lobra.planner.packed.least_times import Cost
from lobra.planner.packed.local_search import improve
from lobra.planner.packed.longest_first import longest_first
from lobra.planner.packed.micro_batches import fewest, for_pipeline
from lobra.planner.packed.minorant import Minorant
from lobra.planner.packed.shared_sizes import shared
from lobra.planner.packed.step_work import StepWork, minorants_of, step_work
from lobra.profiler.cost_model import CostModel

ROUNDS = 20  # of local search
FAR = 0.015  # from the bound: there another start is tried


def packed_costs(plan: Plan, cost_model: CostModel) -> list[Cost]:
    """Return what a packed micro-batch takes on each group of a plan."""
    return [_cost_on(group.layout, cost_model) for group in plan.groups]


@lru_cache(maxsize=256)
def _cost_on(layout: Layout, cost_model: CostModel) -> Cost:
    """Return a layout's cost; the same one again, so that what follows from it is kept."""
    return lambda tokens, squares: cost_model.micro_batch_time(layout, tokens, squares).total_ms


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
    table = ReplicaTable.of(plan, costs, factors)
    minorants = minorants_of(plan, costs, lengths)
    work, length_of = step_work(table, plan, minorants, lengths)
    filling, bound_s = _dispatched(table, minorants, work, lengths, length_of)
    return Assignment(_rows(table, filling), filling.replica_time_s, bound_s, sync_time_s)


def _dispatched(
    table: ReplicaTable,
    minorants: Sequence[Minorant],
    work: StepWork,
    lengths: IntArray,
    length_of: IntArray,
) -> tuple[Filling, float]:
    """Return the best filling found, and what no filling is below."""
    typical = work.lengths[0] / work.parts_s[:, 0]
    whole_s = crowded_s(work)
    prices = prices_of(work, max(least_time_s(work, typical), whole_s))
    bound_s = max(least_time_s(work, prices), whole_s)
    work, prices = without_long_bubbles(work.with_whole_starts(prices), bound_s)
    more_s = [0.0] * len(work.kinds)
    step_s = bound_s
    found: list[Filling] = []
    for own_prices in (prices, prices, None):  # again with what the replicas before really took
        replicas, ends_s = longest_first(work, length_of, step_s, own_prices, more_s)
        filling = _filling_of(table, minorants, lengths, replicas)
        filling = shared(table, lengths, filling, work.kinds)
        found.append(filling)
        if len(work.kinds) == 1 or filling.step_time_s <= bound_s * (1.0 + FAR):
            break
        times_s = filling.replica_time_s
        step_s = max(bound_s, float(times_s.mean()))
        for kind, own in enumerate(ends_s):
            more_s[kind] += float(np.mean([times_s[replica] - end for replica, end in own.items()]))
    best = min(found, key=lambda filling: filling.step_time_s)
    best = improve(table, lengths, best, bound_s, ROUNDS)
    return best, min(bound_s, best.step_time_s)


def _filling_of(
    table: ReplicaTable,
    minorants: Sequence[Minorant],
    lengths: IntArray,
    replicas: IntArray,
) -> Filling:
    """Return the micro-batches of sequences on replicas: the fewest, or the best for a pipeline."""
    order = np.lexsort((-lengths, replicas))
    starts = np.searchsorted(replicas[order], np.arange(len(table.group) + 1))
    batch_of = np.empty(len(lengths), dtype=np.int64)
    replica_of: list[int] = []
    for replica, (start, end) in enumerate(pairwise(starts.tolist())):
        own = order[start:end]
        if len(own):
            group = table.group[replica]
            bubbles, max_tokens = int(table.bubbles[replica]), int(table.max_tokens[replica])
            if bubbles:
                parts = minorants[group].marginal_ms(lengths[own])
                cost = table.costs[group]
                batches = for_pipeline(lengths[own], parts, max_tokens, bubbles, cost)
            else:
                batches = fewest(lengths[own].tolist(), max_tokens)
            batch_of[own] = np.asarray(batches) + len(replica_of)
            replica_of += [replica] * (max(batches) + 1)
    return filled(table, lengths, batch_of, np.array(replica_of, dtype=np.int64))


def _rows(table: ReplicaTable, filling: Filling) -> tuple[tuple[Rows, ...], ...]:
    """Return every replica's micro-batches, the costliest first."""
    order = np.argsort(filling.batch_of, kind="stable")
    starts = np.searchsorted(filling.batch_of[order], np.arange(len(filling.replica_of) + 1))
    rows: list[list[Rows]] = [[] for _ in table.group]
    tokens = filling.tokens.tolist()
    for batch in np.lexsort((np.arange(len(starts) - 1), -filling.times_s)).tolist():
        start, end = starts[batch], starts[batch + 1]
        if end > start:
            rows[filling.replica_of[batch]].append(Rows(order[start:end], tokens[batch]))
    return tuple(map(tuple, rows))
