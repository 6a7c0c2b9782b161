"""Which replica takes which sequences: the longest goes first, each to where it ends first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np

from lobra.layout.sequences import IntArray
from lobra.planner.packed.step_work import StepWork

DEARER = 0.003  # than at the cheapest kind of replicas a sequence may be, where there is time left


@dataclass(frozen=True, eq=False)
class _Queue:
    """The replicas of a kind.

    Attributes
    ----------
    part_s, bubble_s
        Of a sequence of each length: its seconds, with its share of bubbles, and what it adds to
        these as the longest of its replica.
    ends
        A heap of (seconds when it ends, replica).
    idle_s
        When a replica without work ends.
    """

    part_s: list[float]
    bubble_s: list[float]
    ends: list[tuple[float, int]]
    idle_s: float


def longest_first(
    work: StepWork,
    length_of: IntArray,
    step_time_s: float,
    prices: np.ndarray | None,
    more_s: Sequence[float],
) -> tuple[IntArray, list[dict[int, float]]]:
    """Return the replica of every sequence, int64 [n], and by kind the seconds when each ends.

    Parameters
    ----------
    work
        The step's lengths, J of them, and the kinds of replicas.
    length_of
        int64 [n]: which of the lengths each sequence has.
    step_time_s
        About the seconds that the step will take.
    prices
        Of the kinds' time: a sequence goes where it is cheapest, as long as the time allows. None:
        to where it ends first.
    more_s
        Of each kind, the seconds that its replicas take beyond those of their sequences.
    """
    queues = _queues(work, step_time_s, more_s)
    chosen = [[queues[kind] for kind in kinds] for kinds in _cheapest(work, prices)]
    order = np.argsort(-length_of, kind="stable")
    taking = []
    for length in length_of[order].tolist():
        end_s, ends = _first_end(chosen[length], length)
        if end_s > step_time_s and len(chosen[length]) < len(queues):
            end_s, ends = _first_end(queues, length)
        taking.append(replica := ends[0][1])
        heapreplace(ends, (end_s, replica))
    replicas = np.empty(len(order), dtype=np.int64)
    replicas[order] = taking
    ends_s = [{replica: end_s for end_s, replica in queue.ends} for queue in queues]
    return replicas, ends_s


def _first_end(queues: Sequence[_Queue], length: int) -> tuple[float, list[tuple[float, int]]]:
    """Return the seconds when a sequence of the length ends where it ends first, and the heap."""
    best_s, best = math.inf, queues[0].ends
    for queue in queues:
        end_s = queue.ends[0][0]
        if end_s == queue.idle_s:
            end_s += queue.bubble_s[length]
        end_s += queue.part_s[length]
        if end_s < best_s:
            best_s, best = end_s, queue.ends
    return best_s, best


def _queues(work: StepWork, step_time_s: float, more_s: Sequence[float]) -> list[_Queue]:
    """Return the replicas without work.

    Of a pipeline's time its bubbles take the share that they take of the step's. The longest
    sequence adds what it takes more than a micro-batch does then.
    """
    queues = []
    most = int(work.counts.sum())
    for kind, parts_s, idle_s in zip(work.kinds, work.parts_s, more_s, strict=True):
        held_s, each_s = kind.held_s(step_time_s, most)
        longer = step_time_s / held_s if held_s > 0.0 else 1.0 + kind.bubbles
        fitting_s = np.where(np.isfinite(parts_s), parts_s, 0.0)
        start_s = kind.minorant.start_ms / 1000.0 * kind.factor
        bubble_s = kind.bubbles * np.maximum(0.0, fitting_s + start_s - each_s)
        ends = [(idle_s, replica) for replica in kind.replicas.tolist()]  # all equal: a heap
        queues.append(_Queue((parts_s * longer).tolist(), bubble_s.tolist(), ends, idle_s))
    return queues


def _cheapest(work: StepWork, prices: np.ndarray | None) -> list[list[int]]:
    """Return, by length, the kinds that are about the cheapest for it; of all without prices."""
    if prices is None or len(prices) == 1:
        near = np.isfinite(work.parts_s)
    else:
        cost = prices[:, None] * work.parts_s
        near = cost <= (1.0 + DEARER) * cost.min(axis=0)
    found: dict[tuple[bool, ...], list[int]] = {}
    columns = [tuple(column) for column in near.T.tolist()]
    for column in columns:
        if column not in found:
            found[column] = np.flatnonzero(column).tolist()
    return [found[column] for column in columns]
