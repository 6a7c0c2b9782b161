from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from planner.chunks import ChunkTable, chunk_table
from planner.layout import Layout
from planner.planners.whole_chunks import WholeChunks
from planner.resplit import balance_groups, descend, resplit, shake
from planner.search import Loads
from tests.planner.support import best_dispatch_s, random_cost_model, random_problem

LAYOUTS = ((1, 1), (2, 1), (1, 2), (4, 1))
TICKS = 4096


def random_tables(rng: np.random.Generator, most: int) -> list[ChunkTable]:
    cost_model, buckets = (
        random_cost_model(rng),
        np.sort(rng.choice(30, 3, replace=False)) * 64 + 64,
    )
    return [
        chunk_table(
            Layout(tp, pp), int(rng.integers(2000, 5000)), buckets, cost_model, np.full(3, most)
        )
        for tp, pp in LAYOUTS
    ]


def loads_of(tables: list[ChunkTable], group: np.ndarray, counts: np.ndarray) -> Loads:
    most = int(counts.sum(axis=0).max())
    bubbles = np.array([table.bubble_s() for table in tables])
    return Loads(
        np.stack([table.work_s(most) for table in tables]),
        group,
        bubbles[group],
        counts.copy(),
        np.stack([table.limit for table in tables]),
    )


@pytest.mark.parametrize("seed", range(60))
def test_two_replicas_are_divided_as_brute_force_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, 12)
    counts = rng.integers(0, 6, size=(2, 3))
    group = rng.integers(0, len(tables), size=2)
    pool = counts.sum(axis=0)
    loads = loads_of(tables, group, counts)
    before_s = loads.time_s.max()
    best_s = min(
        max(loads.time_of(0, np.array(taken)), loads.time_of(1, pool - np.array(taken)))
        for taken in product(*(range(number + 1) for number in pool))
    )
    changed = resplit(loads, 0, 1, before_s, TICKS)
    assert (loads.counts.sum(axis=0) == pool).all()
    assert changed == (loads.time_s.max() < before_s)
    # three buckets, each rounded by half a tick at most on the way to a division
    assert best_s - 1e-12 <= loads.time_s.max() <= best_s + 3 * before_s / TICKS
    assert loads.time_s == pytest.approx([loads.time_of(i, loads.counts[i]) for i in (0, 1)])


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_the_slowest_is_never_slower(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, 40)
    group = np.sort(rng.integers(0, len(tables), size=7))
    counts = rng.integers(0, 6, size=(7, 3))
    loads = loads_of(tables, group, counts)
    for search in (
        lambda: balance_groups(loads, 0.0, 512),
        lambda: descend(loads, 0.0, 512, 10),
        lambda: shake(loads, 0.0, 512, 5, np.random.default_rng(seed)),
    ):
        before_s = loads.time_s.max()
        search()
        assert loads.time_s.max() <= before_s
        assert (loads.counts >= 0).all()
        assert (loads.counts.sum(axis=0) == counts.sum(axis=0)).all()


@pytest.mark.parametrize("seed", range(80))
def test_whole_chunks_never_exclude_a_plan_that_reaches_the_step_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, max_count=4)
    longest = int(problem.buckets[-1])
    holds = np.array([candidate.max_tokens >= longest for candidate in problem.candidates])
    replicas = np.zeros(len(problem.candidates), dtype=np.int64)
    replicas[int(rng.choice(np.flatnonzero(holds)))] += 1
    replicas[int(rng.integers(len(replicas)))] += 1
    tables = list(problem.tables)
    every = [tables[i] for i in np.repeat(np.arange(len(replicas)), replicas)]
    step_s = best_dispatch_s(every, problem.counts) * (1 + 1e-9)
    whole = WholeChunks(tables, problem.counts, step_s)
    layouts = np.flatnonzero(replicas)
    for _ in range(10):
        values = np.zeros(len(replicas))
        values[layouts] = rng.random(len(layouts))
        nothing = np.zeros(len(problem.counts))
        assert whole.needed(values, nothing, layouts) <= values @ replicas + 1e-9
