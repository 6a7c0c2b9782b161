"""The dispatcher: which sequences go to which replica this step, in which micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lobra.common.errors import ConfigError
from lobra.layout.plan import Plan
from lobra.planner.assignment import Assignment, Rows
from lobra.planner.bucketed.buckets import bucket_index, checked_lengths, make_buckets
from lobra.planner.bucketed.dispatch import (
    MODES,
    CountAssignment,
    Mode,
    dispatch_counts,
    dispatch_slowed,
)
from lobra.planner.step_time import pipeline_time, sync_time_s
from lobra.profiler.cost_model import CostModel, padded_work


@dataclass(frozen=True, eq=False)
class BucketedAssignment(Assignment):
    """One step's work, padded; ``buckets`` are the padded lengths used, int64 [R]."""

    buckets: np.ndarray = field(kw_only=True)


def dispatch(
    lengths: Sequence[int] | np.ndarray,
    plan: Plan,
    cost_model: CostModel,
    *,
    buckets: np.ndarray | None = None,
    num_buckets: int = 16,
    mode: Mode = "balance",
    slowdown: Sequence[float] | None = None,
) -> BucketedAssignment:
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
        result = dispatch_slowed(counts, buckets, plan, cost_model, mode, factors)
    return _with_sequences(result, index, buckets, plan, cost_model, factors)


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
) -> BucketedAssignment:
    """Fill the micro-batches with sequences, in order of their index, and order them by cost."""
    order = np.argsort(index, kind="stable")
    taken = np.searchsorted(index[order], np.arange(len(buckets)))
    micro_batches, times_s = [], []
    times_ms = _micro_batch_times_ms(result, buckets, plan, cost_model)
    for replica, batches, own_ms in zip(plan.replicas, result.micro_batches, times_ms, strict=True):
        rows = []
        for bucket, size in batches:
            start = taken[bucket]
            taken[bucket] += size
            length = int(buckets[bucket])
            rows.append(Rows(order[start : start + size], length * size, length))
        costliest = sorted(range(len(rows)), key=lambda at: (-own_ms[at], -batches[at][0], at))
        micro_batches.append(tuple(rows[at] for at in costliest))
        factor = float(slowdown[replica.index])
        times_s.append(pipeline_time(own_ms, replica.layout.pp) / 1000.0 * factor)
    bound_s = min(result.lower_bound_s, max(times_s))
    sync_s = sync_time_s(plan, cost_model)
    return BucketedAssignment(
        tuple(micro_batches), np.array(times_s), bound_s, sync_s, buckets=buckets
    )


def _micro_batch_times_ms(
    result: CountAssignment, buckets: np.ndarray, plan: Plan, cost_model: CostModel
) -> list[list[float]]:
    """Return, per replica, the ms of its micro-batches: one call of the cost model per group."""
    times_ms: list[list[float]] = []
    for group in plan.groups:
        members = result.micro_batches[len(times_ms) : len(times_ms) + group.replicas]
        pairs = np.array([pair for batches in members for pair in batches], dtype=np.int64)
        bucket, size = pairs.reshape(-1, 2).T
        work = padded_work(size, buckets[bucket])
        flat = cost_model.micro_batch_time(group.layout, *work).total_ms.tolist()
        for batches in members:
            times_ms.append(flat[: len(batches)])
            flat = flat[len(batches) :]
    return times_ms
