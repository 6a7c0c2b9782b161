"""Dispatch of a batch given by its buckets: how many sequences of each go to which replica."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup
from lobra.planner.bucketed.initial_loads import fluid_loads, greedy_loads
from lobra.planner.bucketed.loads import Loads, micro_batches_of
from lobra.planner.bucketed.local_search import improve
from lobra.planner.bucketed.resplit import balance_groups, descend, shake
from lobra.planner.bucketed.time_table import CountedBatches, by_length, plan_tables
from lobra.profiler.cost_model import CostModel

Mode = Literal["balance", "group"]
MODES: tuple[Mode, ...] = ("balance", "group")
GOOD_ENOUGH = 1e-3  # relative distance to the bound at which the search stops
FAR_OFF = 8e-3  # the same from which on dearer moves are tried
FAR_OFF_REPLICA = 0.04  # and the part of one replica by which the bound may be too low
TICKS = 1024
RESPLITS, SHAKES = 20, 10
EASY_PARTNERS = 4  # replicas that cheap swaps are tried with
SLOWDOWN_STEP = 5e-3  # replicas within it count as equally slow


@dataclass(frozen=True, eq=False)
class CountAssignment:
    """A dispatch at bucket level: per replica its micro-batches as pairs (bucket, sequences)."""

    micro_batches: tuple[CountedBatches, ...]
    step_time_s: float
    lower_bound_s: float


def dispatch_counts(
    counts: np.ndarray,
    buckets: np.ndarray,
    plan: Plan,
    cost_model: CostModel,
    *,
    mode: Mode = "balance",
    slowdown: np.ndarray | None = None,
    thorough: bool = True,
) -> CountAssignment:
    """Assign ``counts`` [R] sequences of the ``buckets`` [R]; the core of ``dispatch``.

    The fluid relaxation says how much of each bucket every group of equal replicas takes; its
    micro-batches go to the replicas longest first; local search then moves and swaps sequences, if
    ``thorough`` with dearer moves too while the result is far from the bound.
    """
    counts = np.asarray(counts, dtype=np.int64)
    tables = plan_tables(plan, buckets, cost_model, counts)
    if mode == "group":
        tables = by_length(tables)
    if slowdown is not None:
        tables = [table.slowed(factor) for table, factor in zip(tables, slowdown, strict=True)]
    replicas = np.array([group.replicas for group in plan.groups])
    start = fluid_loads(tables, replicas, counts)
    search_loads(start.loads, start.bound_s, thorough)
    found = micro_batches_of(start.loads, start.tables)
    good_s = start.bound_s * (1 + GOOD_ENOUGH)
    is_far_off = _slowest_s(found) > start.bound_s * (1 + far_off(len(start.loads.group)))
    if thorough and _slowest_s(found) > good_s:  # of few sequences greedy may be nearer
        loads = greedy_loads(tables, start.loads.group, counts)
        found = min(found, micro_batches_of(loads, tables), key=_slowest_s)
        if is_far_off:
            # what search takes for better need not be: it counts the longest bubble there can be
            improve(loads, good_s, len(loads.group))
            found = min(found, micro_batches_of(loads, tables), key=_slowest_s)
    step_s = _slowest_s(found)
    return CountAssignment(found[0], step_s, min(start.bound_s, step_s))


def _slowest_s(found: tuple[Any, list[float]]) -> float:
    return max(found[1])


def dispatch_slowed(
    counts: np.ndarray,
    buckets: np.ndarray,
    plan: Plan,
    cost_model: CostModel,
    mode: Mode,
    factors: np.ndarray,
) -> CountAssignment:
    """Dispatch over replicas that are slower than modelled; those about as slow form a group.

    Factors are rounded down to steps of 0.5 %, so the bound stays one.
    """
    steps = np.floor(np.log(factors) / SLOWDOWN_STEP).astype(np.int64)
    alike: dict[tuple[Layout, int, int], list[int]] = {}
    for replica, step in zip(plan.replicas, steps.tolist(), strict=True):
        key = (replica.layout, replica.max_tokens, step)
        alike.setdefault(key, []).append(replica.index)
    groups = tuple(
        ReplicaGroup(layout, len(members), max_tokens)
        for (layout, max_tokens, _), members in alike.items()
    )
    slowdown = np.exp(SLOWDOWN_STEP * np.array([step for _, _, step in alike]))
    found = dispatch_counts(counts, buckets, Plan(groups), cost_model, mode=mode, slowdown=slowdown)
    order = [index for members in alike.values() for index in members]
    batches = dict(zip(order, found.micro_batches, strict=True))
    return replace(found, micro_batches=tuple(batches[index] for index in range(len(order))))


def far_off(num_replicas: int) -> float:
    """Return the relative distance to the bound from which on dearer moves are tried.

    The bound divides what replicas take whole: of few replicas that is a larger part.
    """
    return FAR_OFF + FAR_OFF_REPLICA / num_replicas


def search_loads(loads: Loads, bound_s: float, thorough: bool = True) -> None:
    """Shorten the slowest replica's time: cheap moves first, dearer ones while it is far off."""
    enough_s = bound_s * (1 + far_off(len(loads.group)))
    target_s = bound_s * (1 + GOOD_ENOUGH)
    rounds = max(400, 4 * len(loads.group))
    initial = loads.counts.copy()
    improve(loads, target_s, rounds, max_exchanges=0, swap_partners=EASY_PARTNERS)
    best, best_s = loads.counts.copy(), loads.time_s.max()
    if best_s <= enough_s or not thorough:
        return
    for balanced in (True, False):
        loads.restore(initial)
        if balanced:  # of few large sequences balanced groups may leave the moves no way out
            balance_groups(loads, target_s, TICKS)
        improve(loads, target_s, rounds)
        if loads.time_s.max() < best_s:
            best, best_s = loads.counts.copy(), loads.time_s.max()
        if best_s <= enough_s:
            break
    loads.restore(best)
    if best_s > enough_s:
        descend(loads, target_s, TICKS, RESPLITS)
    if loads.time_s.max() > enough_s:
        shake(loads, target_s, TICKS, SHAKES, np.random.default_rng(0))
