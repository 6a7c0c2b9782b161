"""The fluid relaxation of one plan: sequences divisible, chunks always at their best rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from planner.chunks import ChunkTable
from tasks.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Fluid:
    """The optimum of the relaxation.

    Attributes
    ----------
    step_time_s
        A lower bound on the step time of every dispatch.
    share
        float64 [groups, R]: sequences of each bucket that each replica group takes.
    price_s
        float64 [R]: by how much the step time grows per further sequence of the bucket.
    """

    step_time_s: float
    share: np.ndarray
    price_s: np.ndarray


def solve_fluid(
    tables: list[ChunkTable], replicas: np.ndarray, counts: np.ndarray, bubbles_s: np.ndarray
) -> Fluid:
    """Minimise T with ``sum_j rate_gj x_gj <= p_g (T - bubble_g)`` and all sequences taken.

    Parameters
    ----------
    tables
        One per replica group.
    replicas
        int [groups]: p_g.
    counts
        int [R]: sequences of each bucket.
    bubbles_s
        float64 [groups]: what each replica loses to the pipeline's bubble; for a bound at most
        what any dispatch must lose.

    Raises
    ------
    ConfigError
        If a bucket with sequences fits no group.
    """
    rates = np.stack([table.rate_s() for table in tables])
    groups, num_buckets = rates.shape
    used = counts > 0
    stuck = used & ~np.isfinite(rates).any(axis=0)
    if stuck.any():
        raise ConfigError("a bucket fits no replica of the plan")
    group, bucket = np.nonzero(np.isfinite(rates) & used[None, :])
    columns = len(group)
    if columns == 0:
        return Fluid(0.0, np.zeros_like(rates), np.zeros(num_buckets))
    upper = np.zeros((groups, columns + 1))
    upper[group, np.arange(columns)] = rates[group, bucket]
    upper[:, -1] = -replicas
    rows = np.cumsum(used) - 1
    equal = np.zeros((int(used.sum()), columns + 1))
    equal[rows[bucket], np.arange(columns)] = 1.0
    objective = np.zeros(columns + 1)
    objective[-1] = 1.0
    result = linprog(
        objective,
        A_ub=upper,
        b_ub=-replicas * bubbles_s,
        A_eq=equal,
        b_eq=counts[used],
        bounds=(0, None),
        method="highs-ds",
    )
    if result.status != 0:
        raise RuntimeError(f"the fluid relaxation was not solved: {result.message}")
    share = np.zeros_like(rates)
    share[group, bucket] = result.x[:-1]
    price = np.zeros(num_buckets)
    price[used] = result.eqlin.marginals
    return Fluid(float(result.x[-1]), share, price)
