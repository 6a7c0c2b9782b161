from __future__ import annotations

from itertools import product

import numpy as np

from lobra.planner.bucketed.partitions import closed, count_closed, maximal


def test_closed_plans_are_counted_and_leave_no_room_for_their_own_kinds() -> None:
    for sizes, num_gpus in (([2, 3, 4], 11), ([1, 2, 2, 4], 6), ([4, 8], 7), ([2, 5], 1)):
        candidates = np.array(sizes)
        expected = set()
        for plan in product(*(range(num_gpus // size + 1) for size in sizes)):
            left = num_gpus - int(np.dot(plan, sizes))
            if any(plan) and 0 <= left < min(s for s, p in zip(sizes, plan, strict=True) if p):
                expected.add(plan)
        assert count_closed(candidates, num_gpus) == len(expected)
        if expected:
            listed = [tuple(plan) for plan in closed(candidates, num_gpus).tolist()]
            assert len(listed) == len(expected) and set(listed) == expected


def test_maximal_plans_leave_no_room_and_are_all_there() -> None:
    sizes = np.array([2, 3, 4])
    plans = maximal(sizes, 11)
    totals = plans @ sizes
    assert (totals <= 11).all() and (totals > 11 - 2).all()
    listed = {tuple(plan) for plan in plans.tolist()}
    expected = {
        (a, b, c)
        for a in range(6)
        for b in range(4)
        for c in range(3)
        if 11 - 2 < 2 * a + 3 * b + 4 * c <= 11
    }
    assert listed == expected
