"""Plans near a plan: layouts exchanged for others, idle GPUs put to use."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lobra.planner.bucketed.fluid import amounts, solve_rates
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.search import Search, key_of


def promising(search: Search, centre: np.ndarray) -> list[np.ndarray]:
    """Return neighbours of a plan not tried yet, by what the fluid relaxation needs of them."""
    problem = search.problem
    step_s = search.best_s
    reach = np.stack([amounts(table, step_s) for table in problem.tables])
    with np.errstate(divide="ignore"):
        rates = 1.0 / reach
    scored = []
    for replicas in _neighbours(centre, problem.sizes):
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


def _neighbours(replicas: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield plans with one layout's replicas exchanged for as many GPUs of another."""
    for source in np.flatnonzero(replicas).tolist():
        for target in range(len(sizes)):
            if target == source:
                continue
            step = int(np.lcm(sizes[source], sizes[target]))
            for times in (1, 2, 4):
                out, into = times * step // sizes[source], times * step // sizes[target]
                if out <= replicas[source]:
                    changed = replicas.copy()
                    changed[source] -= out
                    changed[target] += into
                    yield changed


def filled(problem: Problem, replicas: np.ndarray) -> np.ndarray:
    """Use idle GPUs for more replicas: first of layouts already there, the largest first."""
    replicas = replicas.copy()
    left = problem.num_gpus - int(replicas @ problem.sizes)
    order = np.lexsort((-problem.sizes, replicas == 0))
    for index in order.tolist():
        number = left // int(problem.sizes[index])
        replicas[index] += number
        left -= number * int(problem.sizes[index])
    return replicas
