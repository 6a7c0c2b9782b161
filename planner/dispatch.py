"""The dispatcher: which sequences go to which replica this step, in which micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup
from lobra.planner.buckets import bucket_index, checked_lengths, make_buckets
from lobra.planner.chunks import ChunkTable, chunk_table
from lobra.planner.evaluate import busy_time_s, sync_time_s
from lobra.planner.first import chunks_of, greedy_start, start_loads
from lobra.planner.resplit import balance_groups, descend, shake
from lobra.planner.search import Loads, improve
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
class Rows:
    """Which sequences make one micro-batch, all padded to ``padded_length`` tokens.

    ``indices`` is int64 [b]: positions in the lengths that were dispatched.
    """

    padded_length: int
    indices: np.ndarray

    @property
    def num_sequences(self) -> int:
        """Sequences in the micro-batch."""
        return len(self.indices)

    @property
    def padded_tokens(self) -> int:
        """Tokens computed, padding included."""
        return self.padded_length * len(self.indices)


@dataclass(frozen=True, eq=False)
class Assignment:
    """One step's work.

    Attributes
    ----------
    micro_batches
        Per replica, in plan order, its micro-batches, the costliest first.
    replica_time_s
        float64 [replicas]: predicted busy time, the pipeline's bubble included.
    step_time_s
        The slowest replica's time.
    lower_bound_s
        No dispatch of these buckets over this plan is faster.
    buckets
        int64 [R]: the padded lengths used.
    sync_time_s
        What synchronising the adapters adds after the slowest replica, where that was profiled.
    """

    micro_batches: tuple[tuple[Rows, ...], ...]
    replica_time_s: np.ndarray
    step_time_s: float
    lower_bound_s: float
    buckets: np.ndarray
    sync_time_s: float = 0.0

    @property
    def padded_tokens(self) -> int:
        """Tokens computed by all replicas, padding included."""
        return sum(chunk.padded_tokens for chunks in self.micro_batches for chunk in chunks)


@dataclass(frozen=True, eq=False)
class CountAssignment:
    """A dispatch at bucket level: ``chunks[replica]`` are pairs (bucket index, sequences)."""

    chunks: tuple[tuple[tuple[int, int], ...], ...]
    step_time_s: float
    lower_bound_s: float


def dispatch(
    lengths: Sequence[int] | np.ndarray,
    plan: Plan,
    cost_model: CostModel,
    *,
    buckets: np.ndarray | None = None,
    num_buckets: int = 16,
    mode: Mode = "balance",
    slowdown: Sequence[float] | None = None,
) -> Assignment:
    """Assign every sequence to a micro-batch of one replica, the replicas finishing together.

    Parameters
    ----------
    lengths
        int [n]: tokens of the step's sequences.
    plan, cost_model
        What runs and what it costs.
    buckets
        Padded lengths to use, ascending; without them the exact dynamic buckets of ``lengths``.
    num_buckets
        The most dynamic buckets.
    mode
        ``balance``: any replica that holds a sequence may take it; ``group``: only replicas with
        the smallest sufficient capacity (LobRA's length-based dispatch).
    slowdown
        Per replica, in plan order: its measured time over the cost model's (1: as modelled).

    Returns
    -------
    Every sequence exactly once, no micro-batch above its replica's ``max_tokens``. The result is
    a function of the arguments alone, bit for bit.

    Raises
    ------
    ConfigError
        If there is no sequence, or one is too long for the buckets or for every replica.
    """
    if mode not in MODES:
        raise ConfigError(f"dispatch {mode!r}: known are {', '.join(MODES)}")
    lengths = checked_lengths(lengths)
    if buckets is None:
        buckets = make_buckets(lengths, num_buckets)
    buckets = np.asarray(buckets, dtype=np.int64)
    if buckets.ndim != 1 or not len(buckets) or (np.diff(buckets, prepend=0) <= 0).any():
        raise ConfigError(f"dispatch: buckets {buckets.tolist()} are not positive and ascending")
    _check_fits(lengths, buckets, plan)
    index = bucket_index(lengths, buckets)
    counts = np.bincount(index, minlength=len(buckets))
    factors = np.ones(len(plan.replicas)) if slowdown is None else np.asarray(slowdown, float)
    if factors.shape != (len(plan.replicas),) or not ((factors > 0) & (factors < np.inf)).all():
        raise ValueError(f"slowdown {slowdown}: not one positive factor per replica of {plan}")
    if (factors == 1.0).all():
        result = dispatch_counts(counts, buckets, plan, cost_model, mode=mode)
    else:
        result = _dispatch_slowed(counts, buckets, plan, cost_model, mode, factors)
    return _with_sequences(result, index, buckets, plan, cost_model, factors)


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
    chunks go to the replicas longest first; local search then moves and swaps sequences, if
    ``thorough`` with dearer moves too while the result is far from the bound.
    """
    counts = np.asarray(counts, dtype=np.int64)
    tables = plan_tables(plan, buckets, cost_model, counts, mode)
    if slowdown is not None:
        tables = [table.slowed(factor) for table, factor in zip(tables, slowdown, strict=True)]
    replicas = np.array([group.replicas for group in plan.groups])
    start = start_loads(tables, replicas, counts)
    search_loads(start.loads, start.bound_s, thorough)
    chunks, times = chunks_of(start.loads, start.tables)
    good_s = start.bound_s * (1 + GOOD_ENOUGH)
    is_far_off = max(times) > start.bound_s * (1 + far_off(len(start.loads.group)))
    if thorough and max(times) > good_s:  # of few sequences greedy may be nearer
        other = greedy_start(start, tables, counts)
        chunks, times = min((chunks, times), chunks_of(other.loads, other.tables), key=_slowest_s)
        if is_far_off:
            # what search takes for better need not be: it counts the longest bubble there can be
            improve(other.loads, good_s, len(other.loads.group))
            found = chunks_of(other.loads, other.tables)
            chunks, times = min((chunks, times), found, key=_slowest_s)
    return CountAssignment(chunks, max(times), min(start.bound_s, max(times)))


def _slowest_s(found: tuple[Any, list[float]]) -> float:
    return max(found[1])


def _dispatch_slowed(
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
    chunks = dict(zip(order, found.chunks, strict=True))
    return replace(found, chunks=tuple(chunks[index] for index in range(len(order))))


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
    first = loads.counts.copy()
    improve(loads, target_s, rounds, max_exchanges=0, swap_partners=EASY_PARTNERS)
    best, best_s = loads.counts.copy(), loads.time_s.max()
    if best_s <= enough_s or not thorough:
        return
    for balanced in (True, False):
        loads.restore(first)
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


def plan_tables(
    plan: Plan,
    buckets: np.ndarray,
    cost_model: CostModel,
    counts: np.ndarray,
    mode: Mode = "balance",
) -> list[ChunkTable]:
    """Return one chunk table per replica group, with only what ``mode`` lets it take."""
    tables = [
        chunk_table(group.layout, group.max_tokens, buckets, cost_model, counts)
        for group in plan.groups
    ]
    if mode == "group":
        capacity = np.array([group.max_tokens for group in plan.groups])
        fits = np.where(capacity[:, None] >= buckets[None, :], capacity[:, None], np.iinfo(int).max)
        smallest = fits.min(axis=0)
        tables = [
            table.limited(np.where(allowed, table.limit, 0))
            for table, allowed in zip(tables, capacity[:, None] == smallest[None, :], strict=True)
        ]
    return tables


def _check_fits(lengths: np.ndarray, buckets: np.ndarray, plan: Plan) -> None:
    if lengths.size == 0:
        raise ConfigError("dispatch: there is no sequence")
    longest = int(lengths.max())
    fitting = np.searchsorted(buckets, longest)
    padded = int(buckets[fitting]) if fitting < len(buckets) else longest
    if padded > plan.max_tokens:
        raise ConfigError(
            f"dispatch: a sequence of {longest} tokens (padded to {padded}) fits no replica of the "
            f"plan {plan}, whose largest holds {plan.max_tokens} tokens; plan for that length or "
            f"lower the context length"
        )


def _with_sequences(
    result: CountAssignment,
    index: np.ndarray,
    buckets: np.ndarray,
    plan: Plan,
    cost_model: CostModel,
    slowdown: np.ndarray,
) -> Assignment:
    """Fill the chunks with sequences, in order of their index, and order them by cost."""
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(len(buckets) + 1))
    taken = starts[:-1].copy()
    micro_batches, times = [], []
    costs = _chunk_costs_ms(result, buckets, plan, cost_model)
    for replica, chunks, cost_ms in zip(plan.replicas, result.chunks, costs, strict=True):
        batches = []
        for bucket, size in chunks:
            start = taken[bucket]
            taken[bucket] += size
            batches.append(Rows(int(buckets[bucket]), order[start : start + size]))
        by_cost = sorted(
            range(len(batches)), key=lambda at: (-cost_ms[at], -batches[at].padded_length, at)
        )
        micro_batches.append(tuple(batches[at] for at in by_cost))
        factor = float(slowdown[replica.index])
        times.append(busy_time_s(replica.layout, cost_ms) * factor)
    step = max(times)
    bound = min(result.lower_bound_s, step)
    sync_s = sync_time_s(plan, cost_model)
    return Assignment(tuple(micro_batches), np.array(times), step, bound, buckets, sync_s)


def _chunk_costs_ms(
    result: CountAssignment, buckets: np.ndarray, plan: Plan, cost_model: CostModel
) -> list[list[float]]:
    """Return, per replica, the ms of its chunks: one call of the cost model per group."""
    costs: list[list[float]] = []
    for group in plan.groups:
        members = result.chunks[len(costs) : len(costs) + group.replicas]
        pairs = np.array([pair for chunks in members for pair in chunks], dtype=np.int64)
        bucket, size = pairs.reshape(-1, 2).T
        layout = group.layout
        flat = cost_model.chunk_time_ms(
            layout.tp, layout.pp, size, buckets[bucket], layout.memory
        ).tolist()
        for chunks in members:
            costs.append(flat[: len(chunks)])
            flat = flat[len(chunks) :]
    return costs
