"""Problems of packed steps, and their optima by brute force."""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import strategies as st

from lobra.layout.layout import Layout
from lobra.layout.sequences import IntArray, packed_tokens
from lobra.planner.bucketed.partitions import maximal
from lobra.planner.candidates import Candidate
from lobra.planner.fleet import Fleet
from lobra.planner.packed.problem import PackedProblem
from lobra.profiler.cost_model import CostModel
from tests.planner.strategies import LAYOUTS, cost_models, lengths


@st.composite
def packed_problems(draw: st.DrawFn, most: int = 6, most_gpus: int = 4) -> PackedProblem:
    """One to three steps of few sequences on few GPUs; some candidate holds the longest."""
    num_gpus = draw(st.integers(1, most_gpus))
    usable = [layout for layout in LAYOUTS if layout.num_gpus <= num_gpus]
    layouts = draw(st.lists(st.sampled_from(usable), min_size=1, max_size=4, unique=True))
    steps = draw(st.lists(lengths(1500, most), min_size=1, max_size=3))
    longest = max(map(max, steps)) + draw(st.integers(0, 200))
    capacities = [draw(st.integers(64, 2000)) for _ in layouts]
    capacities[draw(st.integers(0, len(layouts) - 1))] = longest + draw(st.integers(0, 900))
    candidates = map(Candidate, layouts, capacities)
    fleet = Fleet(tuple(sorted(candidates)), num_gpus, num_gpus)
    arrays = tuple(np.array(step, dtype=np.int64) for step in steps)
    return PackedProblem(arrays, longest, fleet, draw(cost_models()))


def plans_of(problem: PackedProblem) -> list[IntArray]:
    """Return every plan that holds the longest sequence and leaves no room for a replica."""
    fleet = problem.fleet
    every = maximal(fleet.sizes, fleet.num_gpus).astype(np.int64)
    return [plan for plan in every if (fleet.max_tokens[plan > 0] >= problem.longest).any()]


def least_step_s(problem: PackedProblem, replicas: IntArray, step: IntArray) -> float:
    """Return the least time of a step over a plan: every assignment and all micro-batches tried."""
    candidates = problem.fleet.candidates
    each = [
        candidate
        for candidate, number in zip(candidates, replicas.tolist(), strict=True)
        for _ in range(number)
    ]
    times_s = {
        candidate: replica_times_s(candidate, step, problem.cost_model) for candidate in set(each)
    }

    @cache
    def best(place: int, left: int) -> float:
        own_s = times_s[each[place]]
        if place == len(each) - 1:
            return own_s[left]
        return min(max(own_s[part], best(place + 1, left ^ part)) for part in subsets(left))

    return best(0, 2 ** len(step) - 1)


def replica_times_s(candidate: Candidate, step: IntArray, cost_model: CostModel) -> list[float]:
    """Return the least time of a replica with each subset of the sequences, however it is cut."""
    number, bubbles = 2 ** len(step), candidate.layout.pp - 1
    batch_s = [0.0, *(batch_time_s(candidate, step, part, cost_model) for part in range(1, number))]
    least_s = [0.0] + [np.inf] * (number - 1)
    for longest_s in sorted(set(batch_s[1:])) if bubbles else [np.inf]:
        work_s = [0.0] + [np.inf] * (number - 1)
        for whole in range(1, number):
            work_s[whole] = min(
                (
                    batch_s[part] + work_s[whole ^ part]
                    for part in subsets(whole)
                    if part and batch_s[part] <= longest_s
                ),
                default=np.inf,
            )
            bubble_s = bubbles * longest_s if bubbles else 0.0
            least_s[whole] = min(least_s[whole], work_s[whole] + bubble_s)
    return least_s


def batch_time_s(candidate: Candidate, step: IntArray, part: int, cost_model: CostModel) -> float:
    """Return the time of one micro-batch with a subset of the sequences; infinite if too large."""
    own = step[[bool(part >> place & 1) for place in range(len(step))]]
    tokens = int(packed_tokens(own.sum())) if len(own) > 1 else int(own[0])
    if tokens > candidate.max_tokens:
        return np.inf
    layout: Layout = candidate.layout
    time_ms = cost_model.micro_batch_time(layout, tokens, int((own**2).sum())).total_ms
    return float(time_ms) / 1000.0


def subsets(whole: int) -> list[int]:
    """Return every subset of a set of bits, itself and the empty one included."""
    found, part = [whole], whole
    while part:
        part = (part - 1) & whole
        found.append(part)
    return found
