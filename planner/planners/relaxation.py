"""The fluid relaxation over all plans: whole replicas, divisible work (DESIGN, "Planning")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint, milp

from planner.chunks import ChunkTable
from planner.planners.base import Problem


@dataclass(frozen=True, eq=False)
class Skeleton:
    """Replicas per candidate that do the fluid work in ``step_time_s`` with the fewest GPUs."""

    step_time_s: float
    replicas: np.ndarray


class FluidPlanner:
    """Minimum GPUs for a step time T, and the T at which the GPUs suffice.

    With T fixed: minimise ``sum_i n_i p_i`` such that ``sum_j rate_ij x_ij <= p_i (T - bubble_i)``
    and every sequence is taken; p whole. ``rate`` is the least time per sequence over all chunk
    sizes and ``bubble`` that of the smallest chunk, so no real plan needs fewer GPUs.
    """

    def __init__(self, problem: Problem, tables: Sequence[ChunkTable] | None = None) -> None:
        tables = problem.tables if tables is None else tables
        self._problem = problem
        used = problem.counts > 0
        rates = np.stack([table.rate_s() for table in tables])[:, used]
        alone = np.stack([table.time_s[:, 1] for table in tables])[:, used]
        chunks = np.array([table.bubble_chunks for table in tables])
        self._bubble = chunks * alone.min(axis=1)
        # a bucket may go to a layout only if one sequence of it, bubble included, ends by T
        self._alone = alone * (1 + chunks)[:, None]
        self._candidate, self._bucket = np.nonzero(np.isfinite(rates))
        self._rate = rates[self._candidate, self._bucket]
        self._counts = problem.counts[used]

    @property
    def longest_s(self) -> float:
        """A step time below which some bucket's single sequence ends nowhere in time."""
        return float(self._alone.min(axis=0).max())

    def gpus(self, step_time_s: float, whole: bool = True) -> tuple[float, np.ndarray] | None:
        """Return the fewest GPUs (a bound) and the replicas, or None if T is impossible."""
        problem = self._problem
        number = len(problem.candidates)
        columns = len(self._rate)
        in_time = self._alone[self._candidate, self._bucket] <= step_time_s * (1 + 1e-12)
        capacity = np.zeros((number, number + columns))
        capacity[:, :number] = -np.diag(np.maximum(step_time_s - self._bubble, 0.0))
        capacity[self._candidate, number + np.arange(columns)] = self._rate
        cover = np.zeros((len(self._counts), number + columns))
        cover[self._bucket, number + np.arange(columns)] = 1.0
        upper = np.concatenate(
            [
                problem.num_gpus // problem.sizes + 0.0,
                np.where(in_time, self._counts[self._bucket], 0.0),
            ]
        )
        objective = np.concatenate([problem.sizes.astype(float), np.zeros(columns)])
        integrality = np.zeros(number + columns)
        integrality[:number] = float(whole)
        result = milp(
            objective,
            constraints=[
                LinearConstraint(capacity, -np.inf, 0.0),
                LinearConstraint(cover, self._counts, np.inf),
                LinearConstraint(objective[None, :], 0, problem.num_gpus),
            ],
            bounds=(np.zeros(number + columns), upper),
            integrality=integrality,
            options={"mip_rel_gap": 0.0, "time_limit": 20.0},
        )
        if result.x is None:
            return None
        bound = result.fun if not whole else result.mip_dual_bound
        return float(bound), np.rint(result.x[:number]).astype(np.int64)

    def minimum(self, upper_s: float, tolerance: float = 2e-4, whole: bool = True) -> Skeleton:
        """Return the least T whose GPUs suffice, to a relative tolerance, and its replicas.

        ``step_time_s`` of the result is a T proven impossible, or the longest sequence's time: a
        lower bound. ``upper_s`` must be possible.
        """
        low = self.longest_s
        first = self.gpus(low, whole)
        if first is not None:
            return Skeleton(low, first[1])
        high = upper_s
        replicas = None
        while high - low > tolerance * high:
            middle = 0.5 * (low + high)
            found = self.gpus(middle, whole)
            if found is None:
                low = middle
            else:
                high, replicas = middle, found[1]
        if replicas is None:
            found = self.gpus(high, whole)
            replicas = found[1] if found else np.zeros(len(self._problem.candidates), np.int64)
        return Skeleton(low, replicas)
