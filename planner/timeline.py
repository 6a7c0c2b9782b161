"""The timeline of a dispatched step: what each replica's stages do when, by the cost model."""

from __future__ import annotations

import numpy as np

from lobra.layout.plan import Plan
from lobra.layout.sequences import IntArray
from lobra.layout.trace import STEP_DETAILS, ReplicaTrace, Slice
from lobra.planner.assignment import Assignment
from lobra.profiler.cost_model import CostModel, padded_work


def timeline(
    assignment: Assignment,
    lengths: IntArray,
    plan: Plan,
    cost_model: CostModel,
) -> list[ReplicaTrace]:
    """Return every replica's timeline, in plan order; ``lengths`` are what was dispatched.

    A stage's micro-batches lie end to end. Before them it waits for as many of the longest as there
    are stages before it, after them for as many as there are behind it: the bubble.
    """
    replicas = []
    for replica, batches, busy_s in zip(
        plan.replicas, assignment.micro_batches, assignment.replica_time_s.tolist(), strict=True
    ):
        slices, end_s = [], 0.0
        for batch in batches:
            work: tuple[np.ndarray | int, np.ndarray | int]
            if batch.padded_length is None:
                work = batch.padded_tokens, (lengths[batch.indices] ** 2).sum()
                name = f"{batch.num_sequences} packed into {batch.padded_tokens}"
            else:
                work = padded_work(batch.num_sequences, batch.padded_length)
                name = f"{batch.num_sequences} x {batch.padded_length}"
            length_s = float(cost_model.micro_batch_time(replica.layout, *work).total_ms) / 1000.0
            slices.append(Slice(name, end_s, length_s))
            end_s += length_s
        longest_s = max((one.length_s for one in slices), default=0.0)
        padded_tokens = sum(batch.padded_tokens for batch in batches)
        details = dict(zip(STEP_DETAILS, (len(batches), padded_tokens, busy_s), strict=True))
        pp = replica.layout.pp
        stages = [
            _shifted(slices, stage * longest_s, (pp - 1 - stage) * longest_s) for stage in range(pp)
        ]
        name = f"replica {replica.index} {replica.layout}"
        replicas.append(ReplicaTrace(name, [Slice("step 0", 0.0, busy_s, details)], stages))
    return replicas


def _shifted(slices: list[Slice], before_s: float, after_s: float) -> list[Slice]:
    """Return the slices begun later, with the bubble before and behind them."""
    later = [Slice(one.name, one.start_s + before_s, one.length_s) for one in slices]
    if before_s:
        later.insert(0, Slice("bubble", 0.0, before_s))
    if after_s:
        later.append(Slice("bubble", later[-1].start_s + later[-1].length_s, after_s))
    return later
