"""Plans near a plan that the fluid relaxation has hope for."""

from __future__ import annotations

import numpy as np

from lobra.planner.bucketed.fluid import amounts, solve_rates
from lobra.planner.bucketed.search import Search, key_of


def promising(search: Search, centre: np.ndarray) -> list[np.ndarray]:
    """Return neighbours of a plan not tried yet, by what the fluid relaxation needs of them."""
    problem = search.problem
    step_s = search.best_s
    reach = np.stack([amounts(table, step_s) for table in problem.tables])
    with np.errstate(divide="ignore"):
        rates = 1.0 / reach
    scored = []
    for replicas in problem.fleet.neighbours(centre):
        key = key_of(replicas)
        layouts = np.flatnonzero(replicas)
        covered = (reach[layouts] > 0).any(axis=0) | (problem.counts == 0)
        if key in search.times or not covered.all():
            continue
        theta = solve_rates(rates[layouts], replicas[layouts], problem.counts).step_time_s
        if theta < 1.0:
            scored.append((theta, key))
        if search.clock.left_s <= 0:
            break
    return [np.array(key, dtype=np.int64) for _, key in sorted(scored)]
