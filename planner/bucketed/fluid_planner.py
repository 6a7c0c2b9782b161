"""The fluid relaxation over all plans: whole replicas, divisible work (docs/planning.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lobra.planner.bucketed.fluid import amounts
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.time_table import TimeTable, longest_sequence_s
from lobra.planner.clock import Clock

MIP_LIMIT_S = 10.0
CUT_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class Cut:
    """What every plan reaching T satisfies: ``values @ replicas >= needed``; float64 [candidates].

    Needed is the batch's value at some prices per sequence, values what one replica of a layout can
    have of it within T. Valid for T and every smaller step time.
    """

    values: np.ndarray
    needed: float


@dataclass(frozen=True, eq=False)
class FluidPlan:
    """A lower bound on every plan's step time, and the replicas that come nearest to it."""

    step_time_s: float
    replicas: np.ndarray


class FluidPlanner:
    """Minimum GPUs for a step time T, and the T at which the GPUs suffice.

    With T fixed: minimise ``sum_i n_i p_i`` such that ``sum_j x_ij / A_ij(T) <= p_i`` and every
    sequence is taken; p whole, x not. ``A_ij(T)`` is the most a replica can do of one bucket alone
    (``planner.bucketed.fluid.amounts``), so no real plan needs fewer GPUs.
    """

    def __init__(self, problem: Problem, tables: Sequence[TimeTable] | None = None) -> None:
        self._problem = problem
        self._tables = problem.tables if tables is None else tables
        self._used = np.flatnonzero(problem.counts > 0)

    def gpus(
        self, step_time_s: float, limit_s: float = MIP_LIMIT_S, cuts: Sequence[Cut] | None = None
    ) -> np.ndarray | None:
        """Return the replicas that need the fewest GPUs, or None if T is proven impossible.

        With ``cuts`` (valid at T) the replicas satisfy them too, and leave no room for one more.

        If the solver stops undecided the answer is no replicas (zeros): nothing is proven.
        """
        from scipy.optimize import LinearConstraint, milp  # slow to import, and few need it

        problem, counts = self._problem, self._problem.counts[self._used]
        reach = np.stack([amounts(table, step_time_s) for table in self._tables])[:, self._used]
        candidate, bucket = np.nonzero(reach > 0)
        number, columns = len(problem.candidates), len(candidate)
        if len(np.unique(bucket)) < len(counts):
            return None
        capacity = np.zeros((number, number + columns))
        capacity[:, :number] = -np.eye(number)
        capacity[candidate, number + np.arange(columns)] = 1.0 / reach[candidate, bucket]
        cover = np.zeros((len(counts), number + columns))
        cover[bucket, number + np.arange(columns)] = 1.0
        sizes = problem.sizes.astype(float)
        objective = np.concatenate([sizes, np.zeros(columns)])
        integrality = np.zeros(number + columns)
        integrality[:number] = 1.0
        fewest = 0 if cuts is None else problem.num_gpus - int(sizes.min()) + 1
        constraints = [
            LinearConstraint(capacity, -np.inf, 0.0),
            LinearConstraint(cover, counts, np.inf),
            LinearConstraint(objective[None, :], fewest, problem.num_gpus),
        ]
        for cut in cuts or ():
            row = np.zeros((1, number + columns))
            row[0, :number] = cut.values / cut.needed
            constraints.append(LinearConstraint(row, 1.0 - CUT_SLACK, np.inf))
        result = milp(
            objective,
            constraints=constraints,
            bounds=(0, np.concatenate([problem.num_gpus // sizes, counts[bucket]])),
            integrality=integrality,
            options={"time_limit": limit_s},
        )
        if result.x is None:
            proven = result.status == 2
            return None if proven else np.zeros(number, dtype=np.int64)
        return np.rint(result.x[:number]).astype(np.int64)

    def minimum(
        self, upper_s: float, tolerance: float = 2e-4, clock: Clock | None = None
    ) -> FluidPlan:
        """Return the least T whose GPUs suffice, to a relative tolerance, and its replicas.

        ``step_time_s`` of the result is a T proven impossible, or the longest sequence's time: a
        lower bound. ``upper_s`` must be possible. The ``clock`` ends the search early.
        """
        clock = Clock() if clock is None else clock
        longest_s = longest_sequence_s(self._tables, self._problem.counts)
        low, high = longest_s * (1 - 1e-12), upper_s
        replicas = self.gpus(high, min(MIP_LIMIT_S, max(0.1, clock.left_s)))
        while high - low > tolerance * high and clock.left_s > 0:
            middle = 0.5 * (low + high)
            found = self.gpus(middle, min(MIP_LIMIT_S, max(0.1, clock.left_s)))
            if found is None:
                low = middle
            else:
                high, replicas = middle, found
        if replicas is None:
            replicas = np.zeros(len(self._problem.candidates), dtype=np.int64)
        return FluidPlan(low, replicas)
