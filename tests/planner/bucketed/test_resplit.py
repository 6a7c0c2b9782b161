from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.layout import Layout
from lobra.planner.bucketed.loads import Loads
from lobra.planner.bucketed.resplit import balance_groups, descend, resplit, shake
from lobra.planner.bucketed.time_table import TimeTable, time_table
from tests.planner.strategies import cost_models
from tests.tiers import examples

LAYOUTS = ((1, 1), (2, 1), (1, 2), (4, 1))
TICKS = 4096


@st.composite
def tables_of(draw: st.DrawFn, most: int) -> list[TimeTable]:
    """One table a layout, over the same three buckets; at most ``most`` sequences together."""
    cost_model = draw(cost_models())
    ends = draw(st.lists(st.integers(1, 30), min_size=3, max_size=3, unique=True))
    buckets = np.sort(ends) * 64
    return [
        time_table(
            Layout(tp, pp), draw(st.integers(2000, 4999)), buckets, cost_model, np.full(3, most)
        )
        for tp, pp in LAYOUTS
    ]


def held(replicas: int) -> st.SearchStrategy[tuple[list[int], list[list[int]]]]:
    """Return strategies of each replica's layout and of the sequences it has of three buckets."""
    group = st.integers(0, len(LAYOUTS) - 1)
    counts = st.lists(st.integers(0, 5), min_size=3, max_size=3)
    return st.tuples(
        st.lists(group, min_size=replicas, max_size=replicas),
        st.lists(counts, min_size=replicas, max_size=replicas),
    )


def loads_of(tables: list[TimeTable], group: np.ndarray, counts: np.ndarray) -> Loads:
    most = int(counts.sum(axis=0).max())
    bubbles = np.array([table.bubble_s() for table in tables])
    return Loads(
        np.stack([table.work_s(most) for table in tables]),
        group,
        bubbles[group],
        counts.copy(),
        np.stack([table.limit for table in tables]),
    )


@given(tables_of(12), held(2))
@examples(60, 600)
def test_two_replicas_are_divided_as_brute_force_would(
    tables: list[TimeTable], replicas: tuple[list[int], list[list[int]]]
) -> None:
    group, counts = (np.array(part) for part in replicas)
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


@given(tables_of(40), held(7), st.integers(0, 9))
@examples(20, 200)
def test_nothing_is_lost_and_the_slowest_is_never_slower(
    tables: list[TimeTable], replicas: tuple[list[int], list[list[int]]], seed: int
) -> None:
    group, counts = np.sort(replicas[0]), np.array(replicas[1])
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
