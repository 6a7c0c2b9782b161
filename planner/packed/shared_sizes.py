"""Micro-batches that equal replicas make of all their sequences together.

Few sequences seldom fill micro-batches of the best sizes; those of several replicas do.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace

import numpy as np

from lobra.layout.sequences import PACKED_MULTIPLE, IntArray
from lobra.planner.packed.filling import Filling, ReplicaTable, filled
from lobra.planner.packed.micro_batches import into_sizes, near, sizes_of, spare, times_ms
from lobra.planner.packed.step_work import ReplicaKind


def shared(
    table: ReplicaTable, lengths: IntArray, filling: Filling, kinds: Sequence[ReplicaKind]
) -> Filling:
    """Return the filling with the micro-batches of equal replicas made anew where that is better.

    They have the sizes best for the mean replica; the longest go first, each to where it ends
    first. Pipelines stay as they are.
    """
    replica_of = filling.replica_of.tolist()
    batch_of = filling.batch_of.copy()
    at = filling.replica_of[filling.batch_of]
    for kind in kinds:
        number = len(kind.replicas)
        if kind.bubbles or kind.max_tokens < PACKED_MULTIPLE:
            continue
        own = np.flatnonzero(np.isin(at, kind.replicas))
        if not len(own):
            continue
        own = own[np.argsort(-lengths[own], kind="stable")]
        cost = table.costs[table.group[kind.replicas[0]]]
        held = lengths[own]
        tokens = int(held.sum())
        sizes = sizes_of(cost, kind.max_tokens, near(float((held * held).sum() / tokens)))
        each = -(-tokens // number)
        each_sizes = sizes.of(each + spare(-(-each // kind.max_tokens)))
        batches = np.array(into_sizes(held.tolist(), each_sizes * number, kind.max_tokens))
        _, batches = np.unique(batches, return_inverse=True)
        replicas, end_s = _longest_first(
            times_ms(cost, held, batches) * (kind.factor / 1000.0), kind.replicas
        )
        if end_s < filling.replica_time_s[kind.replicas].max():
            batch_of[own] = batches + len(replica_of)
            replica_of += replicas
    return filled(table, lengths, batch_of, np.array(replica_of, dtype=np.int64))


def _longest_first(times_s: np.ndarray, replicas: IntArray) -> tuple[list[int], float]:
    """Return the replica of every micro-batch, and when the last of them ends."""
    heap = [(0.0, replica) for replica in replicas.tolist()]
    found = [0] * len(times_s)
    for batch in np.argsort(-times_s, kind="stable").tolist():
        end_s, found[batch] = heap[0]
        heapreplace(heap, (end_s + float(times_s[batch]), found[batch]))
    return found, max(heap)[0]
