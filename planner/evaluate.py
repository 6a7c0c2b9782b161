"""The one exact evaluator: what a replica's micro-batches and a whole step take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lobra.layout.layout import Layout
from lobra.layout.plan import Plan
from lobra.profiler.cost_model import CostModel


def busy_time_s(layout: Layout, chunk_times_ms: Sequence[float]) -> float:
    """Return the seconds a replica needs for micro-batches of these times.

    Their sum plus pp - 1 times the longest (1F1B, longest chunk first; LobRA, section 4.2). 0
    without any.
    """
    if not len(chunk_times_ms):
        return 0.0
    return (sum(chunk_times_ms) + (layout.pp - 1) * max(chunk_times_ms)) / 1000.0


def replica_time_s(
    layout: Layout, chunks: Iterable[tuple[int, int]], cost_model: CostModel
) -> float:
    """Return the seconds a replica needs for its chunks, pairs (sequences, padded length)."""
    pairs = np.array(list(chunks), dtype=np.int64).reshape(-1, 2)
    times_ms = cost_model.chunk_time_ms(
        layout.tp, layout.pp, pairs[:, 0], pairs[:, 1], layout.memory
    )
    return busy_time_s(layout, times_ms.tolist())


def sync_time_s(plan: Plan, cost_model: CostModel) -> float:
    """Return the seconds that adapters' synchronisation adds at the end of every step.

    Every rank of a replica's tensor-parallel group holds its layers' adapters whole, so each layer
    has as many holders as the replicas' tp together. 0 unless collectives were profiled and the
    cost model knows the adapters: LobRA's objective has no such term.
    """
    holders = sum(group.replicas * group.layout.tp for group in plan.groups)
    fewest_stages = min(group.layout.pp for group in plan.groups)
    layers = -(-cost_model.num_layers // fewest_stages)
    return cost_model.sync_time_ms(holders, layers / cost_model.num_layers) / 1000.0


def step_time_s(
    plan: Plan, chunks: Sequence[Sequence[tuple[int, int]]], cost_model: CostModel
) -> float:
    """Return the seconds of a step's micro-batches: the slowest replica's time.

    What comes after them is `sync_time_s`. ``chunks`` holds, per replica in plan order, its pairs
    (sequences, padded length).

    Raises
    ------
    ValueError
        If there is not one entry per replica, or a chunk is larger than its replica holds.
    """
    replicas = plan.replicas
    if len(chunks) != len(replicas):
        raise ValueError(f"chunks of {len(chunks)} replicas for a plan of {len(replicas)}")
    for replica, pairs in zip(replicas, chunks, strict=True):
        for size, padded in pairs:
            if size * padded > replica.max_tokens:
                raise ValueError(
                    f"replica {replica.index} {replica.layout}: a chunk of {size} x {padded} "
                    f"tokens, more than its {replica.max_tokens}"
                )
    times = [
        replica_time_s(replica.layout, pairs, cost_model)
        for replica, pairs in zip(replicas, chunks, strict=True)
    ]
    return max(times)
