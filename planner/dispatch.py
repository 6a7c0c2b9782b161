"""The dispatcher: which sequences go to which replica this step, in which micro-batches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planner.buckets import bucket_index, make_buckets
from planner.chunks import ChunkTable, chunk_table
from planner.evaluate import replica_time_s, sync_time_s
from planner.fluid import Fluid, solve_fluid, solve_rates
from planner.plan import Plan, ReplicaGroup
from planner.resplit import balance_groups, descend, shake
from planner.search import Loads, improve
from profiler.cost_model import CostModel
from tasks.errors import ConfigError

Mode = Literal["balance", "group"]
MODES: tuple[Mode, ...] = ("balance", "group")
GOOD_ENOUGH = 1e-3  # relative distance to the bound at which the search stops
FAR_OFF, VERY_FAR_OFF = 8e-3, 15e-3  # the same from which on dearer moves are tried
TICKS = 1024
RESPLITS, SHAKES = 20, 10


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Sequences computed together, all padded to ``padded_length`` tokens.

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

    micro_batches: tuple[tuple[MicroBatch, ...], ...]
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
    lengths = np.asarray(lengths)
    if buckets is None:
        buckets = make_buckets(lengths, num_buckets)
    buckets = np.asarray(buckets, dtype=np.int64)
    _check_fits(lengths, buckets, plan)
    index = bucket_index(lengths, buckets)
    counts = np.bincount(index, minlength=len(buckets))
    factors = np.ones(len(plan.replicas)) if slowdown is None else np.asarray(slowdown, float)
    if factors.shape != (len(plan.replicas),) or not (factors > 0).all():
        raise ValueError(f"slowdown {slowdown}: not one positive factor per replica of {plan}")
    if (factors == 1.0).all():
        result = dispatch_counts(counts, buckets, plan, cost_model, mode=mode)
    else:  # replicas of a group differ: each becomes a group of its own
        groups = [ReplicaGroup(r.layout, 1, r.max_tokens) for r in plan.replicas]
        single = Plan(tuple(groups))
        result = dispatch_counts(counts, buckets, single, cost_model, mode=mode, slowdown=factors)
    return _with_sequences(result, index, buckets, plan, cost_model, factors)


def dispatch_counts(
    counts: np.ndarray,
    buckets: np.ndarray,
    plan: Plan,
    cost_model: CostModel,
    *,
    mode: Mode = "balance",
    slowdown: np.ndarray | None = None,
) -> CountAssignment:
    """Assign ``counts`` [R] sequences of the ``buckets`` [R]; the core of ``dispatch``.

    The fluid relaxation says how much of each bucket every group of equal replicas takes; its
    chunks go to the replicas longest first; local search then moves and swaps sequences.
    """
    counts = np.asarray(counts, dtype=np.int64)
    tables = plan_tables(plan, buckets, cost_model, counts, mode)
    if slowdown is not None:
        tables = [table.slowed(factor) for table, factor in zip(tables, slowdown, strict=True)]
    replicas = np.array([group.replicas for group in plan.groups])
    start = start_loads(tables, replicas, counts)
    search_loads(start.loads, start.bound_s)
    chunks, times = chunks_of(start.loads, start.tables)
    return CountAssignment(chunks, max(times), min(start.bound_s, max(times)))


@dataclass(frozen=True, eq=False)
class Start:
    """A first assignment to search from.

    ``loads`` has one group per table; of pipelined ``tables`` the longest chunks may be left out,
    where a shorter bubble gains more. No dispatch is faster than ``bound_s``.
    """

    loads: Loads
    tables: list[ChunkTable]
    bound_s: float


def start_loads(tables: list[ChunkTable], replicas: np.ndarray, counts: np.ndarray) -> Start:
    """Return the fluid relaxation's shares in whole chunks, dealt longest first.

    ``replicas`` is int64 [groups], one group per table; ``counts`` int64 [R].
    """
    fluid = solve_fluid(tables, replicas, counts)
    bound_s = max(fluid.step_time_s, longest_sequence_s(tables, counts))
    tables, share = _limit_chunks(tables, replicas, counts, fluid)
    bubbles = np.array([table.bubble_s() for table in tables])
    group = np.repeat(np.arange(len(tables)), replicas)
    loads = Loads(
        np.stack([table.work_s(int(counts.max(initial=0))) for table in tables]),
        group,
        bubbles[group],
        _first_assignment(tables, replicas, counts, share),
        np.stack([table.limit for table in tables]),
    )
    return Start(loads, tables, bound_s)


def chunks_of(
    loads: Loads, tables: Sequence[ChunkTable]
) -> tuple[tuple[tuple[tuple[int, int], ...], ...], list[float]]:
    """Return every replica's chunks, pairs (bucket, sequences), and its seconds, exactly."""
    chunks = tuple(
        tuple(
            (bucket, size)
            for bucket in np.flatnonzero(row).tolist()
            for size in tables[group].split(bucket, int(row[bucket]))
        )
        for group, row in zip(loads.group.tolist(), loads.counts, strict=True)
    )
    times = [
        _chunks_time_s(tables[group], pairs)
        for group, pairs in zip(loads.group.tolist(), chunks, strict=True)
    ]
    return chunks, times


def search_loads(loads: Loads, bound_s: float) -> None:
    """Shorten the slowest replica's time: cheap moves first, dearer ones while it is far off."""
    target_s = bound_s * (1 + GOOD_ENOUGH)
    rounds = max(400, 4 * len(loads.group))
    first = loads.counts.copy()
    balance_groups(loads, target_s, TICKS)
    improve(loads, target_s, rounds)
    if loads.time_s.max() <= bound_s * (1 + FAR_OFF):
        return
    balanced, balanced_s = loads.counts.copy(), loads.time_s.max()
    loads.restore(first)  # few large sequences: balanced groups may leave the moves no way out
    improve(loads, target_s, rounds)
    if loads.time_s.max() >= balanced_s:
        loads.restore(balanced)
    descend(loads, target_s, TICKS, RESPLITS)
    if loads.time_s.max() > bound_s * (1 + VERY_FAR_OFF):
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


def longest_sequence_s(tables: list[ChunkTable], counts: np.ndarray) -> float:
    """Return a bound: every bucket's single sequence on the layout that is fastest for it."""
    alone = np.stack([table.time_s[:, 1] * (1 + table.bubble_chunks) for table in tables])
    return float(alone.min(axis=0)[counts > 0].max(initial=0.0))


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


def _limit_chunks(
    tables: list[ChunkTable], replicas: np.ndarray, counts: np.ndarray, fluid: Fluid
) -> tuple[list[ChunkTable], np.ndarray]:
    """Limit the chunks of pipelined groups where a shorter bubble gains more than it costs.

    Returns the tables with their chunks limited, and float64 [groups, R]: the sequences that each
    group takes when its replicas lose the bubble of their limit.
    """
    if not any(table.bubble_chunks for table in tables):
        return tables, fluid.share
    chosen = [
        table.capped(_best_cap_s(table, fluid.share[group] / replicas[group]))
        if table.bubble_chunks and fluid.share[group].any()
        else table
        for group, table in enumerate(tables)
    ]
    fits = np.stack([table.limit > 0 for table in chosen]).any(axis=0)
    missing = (counts > 0) & ~fits
    if missing.any():  # lift limits that leave a bucket without any replica
        chosen = [
            table if (table.limit[missing] > 0).any() else limited
            for table, limited in zip(tables, chosen, strict=True)
        ]
    bubbles = np.array([table.bubble_s() for table in chosen])
    rates = np.stack([table.rate_s() for table in chosen])
    longest_s = max(fluid.step_time_s, float(bubbles.max()) * 1.01)
    for _ in range(2):  # the bubble's part of the step depends on the step's length
        worked = np.maximum(1.0 - bubbles / longest_s, 0.01)
        limited = solve_rates(rates / worked[:, None], replicas, counts)
        longest_s = max(limited.step_time_s, float(bubbles.max()) * 1.01)
    return chosen, limited.share


def _best_cap_s(table: ChunkTable, share: np.ndarray) -> float:
    """Return the longest chunk time that makes ``share`` [R] sequences and the bubble shortest."""
    used = np.flatnonzero(share > 1e-9)
    times = table.time_s[used, 1:]
    caps = np.unique(times[np.isfinite(times)])
    caps = caps[caps >= times[:, 0].max(initial=0.0)]
    work = np.zeros(len(caps))
    for row, bucket in zip(times, used, strict=True):
        row = row[np.isfinite(row)]
        order = np.argsort(row, kind="stable")
        best = np.minimum.accumulate((row / np.arange(1, len(row) + 1))[order])
        work += share[bucket] * best[np.searchsorted(row[order], caps, side="right") - 1]
    return float(caps[np.argmin(work + table.bubble_chunks * caps)])


def _first_assignment(
    tables: list[ChunkTable], replicas: np.ndarray, counts: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """Return int64 [Q, R]: shares rounded to whole sequences, chunks longest first."""
    whole = np.floor(share + 1e-9).astype(np.int64)
    takes = np.stack([table.limit > 0 for table in tables])
    missing = counts - whole.sum(axis=0)
    for bucket in np.flatnonzero(missing > 0).tolist():
        order = np.lexsort((np.arange(len(tables)), -(share - whole)[:, bucket]))
        order = order[takes[order, bucket]]
        for number in range(int(missing[bucket])):
            whole[order[number % len(order)], bucket] += 1
    for bucket in np.flatnonzero(missing < 0).tolist():
        whole[int(np.argmax(whole[:, bucket])), bucket] += missing[bucket]
    assigned = np.zeros((int(replicas.sum()), len(counts)), dtype=np.int64)
    first = 0
    for group, table in enumerate(tables):
        chunks = [
            (-float(table.time_s[bucket, size]), bucket, size)
            for bucket in np.flatnonzero(whole[group]).tolist()
            for size in table.split(bucket, int(whole[group, bucket]))
        ]
        heap = [(0.0, replica) for replica in range(first, first + int(replicas[group]))]
        for negative, bucket, size in sorted(chunks):
            busy, replica = heap[0]
            assigned[replica, bucket] += size
            heapq.heapreplace(heap, (busy - negative, replica))
        first += int(replicas[group])
    return assigned


def _chunks_time_s(table: ChunkTable, chunks: tuple[tuple[int, int], ...]) -> float:
    if not chunks:
        return 0.0
    times = [float(table.time_s[bucket, size]) for bucket, size in chunks]
    return sum(times) + table.bubble_chunks * max(times)


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
    for replica, chunks in zip(plan.replicas, result.chunks, strict=True):
        layout = replica.layout
        sizes = np.array([size for _, size in chunks], dtype=np.int64)
        padded = buckets[[bucket for bucket, _ in chunks]] if chunks else np.empty(0, np.int64)
        cost = cost_model.chunk_time_ms(layout.tp, layout.pp, sizes, padded)
        batches = []
        for bucket, size in chunks:
            start = taken[bucket]
            taken[bucket] += size
            batches.append(MicroBatch(int(buckets[bucket]), order[start : start + size]))
        by_cost = np.lexsort((np.arange(len(batches)), -padded, -cost))
        micro_batches.append(tuple(batches[position] for position in by_cost))
        pairs = [(batch.num_sequences, batch.padded_length) for batch in batches]
        factor = float(slowdown[replica.index])
        times.append(replica_time_s(layout, pairs, cost_model) * factor)
    step = max(times)
    bound = min(result.lower_bound_s, step)
    sync_s = sync_time_s(plan, cost_model)
    return Assignment(tuple(micro_batches), np.array(times), step, bound, buckets, sync_s)
