"""Best first over plans: cheap bounds order them, SCIP solves those that could still win."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from planner.chunks import ChunkTable
from planner.clock import Clock
from planner.fluid import solve_rates
from planner.planners.base import Progress, silent
from planner.planners.identical import IdenticalModel, IdenticalResult
from tasks.errors import ConfigError

TIES = 1e-9  # relative: a plan this close to the best is not searched further


@dataclass(frozen=True, eq=False)
class BranchResult:
    """The best plan by LobRA's definition, and what is proven about the others.

    Attributes
    ----------
    replicas
        int64 [candidates].
    objective_s, bound_s
        Its step time by LobRA's definition; no listed plan has less than the bound.
    proven
        Whether every other plan was excluded.
    solved
        Plans whose dispatch was solved in SCIP.
    """

    replicas: np.ndarray
    objective_s: float
    bound_s: float
    proven: bool
    solved: int


class PlanBounds:
    """Lower bounds on the step time of many plans, raised together.

    A price per sequence of each bucket (the dual of the fluid relaxation of ANY plan) bounds every
    plan: ``T >= sum_j d_j price_j / sum_i p_i best_i`` with ``best_i = max_j price_j / rate_ij``,
    the most value a replica of layout i earns per second.
    """

    def __init__(self, tables: Sequence[ChunkTable], counts: np.ndarray, plans: np.ndarray) -> None:
        self._tables, self._counts, self.plans = tables, counts, plans
        self._plans_float = plans.astype(np.float32)
        self._rates = np.stack([table.rate_s() for table in tables])
        self.bound_s = np.zeros(len(plans))
        self.tight = np.zeros(len(plans), dtype=bool)
        fits = np.isfinite(self._rates)
        for bucket in np.flatnonzero(counts):
            stuck = ~(plans[:, fits[:, bucket]] > 0).any(axis=1)
            self.bound_s[stuck] = np.inf
        alone = np.stack([table.time_s[:, 1] * (1 + table.bubble_chunks) for table in tables])
        for bucket in np.flatnonzero(counts):
            best = np.where(plans > 0, alone[:, bucket][None, :], np.inf).min(axis=1)
            np.maximum(self.bound_s, best, out=self.bound_s)

    def tighten(self, index: int) -> None:
        """Solve the fluid relaxation of one plan and let its prices raise all bounds."""
        plan = self.plans[index]
        used = np.flatnonzero(plan).tolist()
        tables = [self._tables[i] for i in used]
        rates = np.stack([table.rate_s() for table in tables])
        fluid = solve_rates(rates, plan[used], self._counts)
        self.bound_s[index] = max(self.bound_s[index], fluid.step_time_s * (1 - 1e-9))
        self.tight[index] = True
        price = np.maximum(fluid.price, 0.0)
        earned = np.where(np.isfinite(self._rates), price[None, :] / self._rates, 0.0).max(axis=1)
        with np.errstate(divide="ignore"):
            bound = float(price @ self._counts) / (self._plans_float @ earned.astype(np.float32))
        # single precision errs by 1e-6 at most; ten times that is given away
        np.maximum(self.bound_s, bound.astype(np.float64) * (1 - 1e-5), out=self.bound_s)


def best_first(
    tables: Sequence[ChunkTable],
    counts: np.ndarray,
    plans: np.ndarray,
    clock: Clock,
    progress: Progress = silent,
) -> BranchResult:
    """Return the plan with the least step time by LobRA's definition.

    Plans are taken in the order of their bounds; SCIP solves their dispatch, only for times below
    the best so far, one per core. It ends when no bound is below the best: then that is proven.

    Raises
    ------
    ConfigError
        If no plan takes every bucket.
    """
    bounds = PlanBounds(tables, counts, plans)
    if not np.isfinite(bounds.bound_s).any():
        raise ConfigError("no plan of the candidate layouts takes every bucket")
    best_s, best_plan = np.inf, None
    open_plans = np.isfinite(bounds.bound_s)
    left_open_s = np.inf
    solved = 0
    workers = max(1, os.cpu_count() or 1)
    running: dict[Future[IdenticalResult], int] = {}
    with ThreadPoolExecutor(max_workers=workers) as pool:
        while True:
            while len(running) < workers and clock.left_s > 0:
                index = _next_plan(bounds, open_plans, best_s, clock)
                if index is None:
                    break
                open_plans[index] = False
                running[pool.submit(_solve, tables, counts, bounds, index, best_s, clock)] = index
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                index, result = running.pop(future), future.result()
                solved += 1
                if result.replicas is not None and result.objective_s < best_s:
                    best_s, best_plan = result.objective_s, bounds.plans[index].astype(np.int64)
                    progress(f"{best_s:.4f} s after {solved} plans")
                if not result.proven:
                    left_open_s = min(left_open_s, max(result.bound_s, bounds.bound_s[index]))
    if open_plans.any():
        left_open_s = min(left_open_s, float(bounds.bound_s[open_plans].min()))
    if best_plan is None:
        raise ConfigError("the time limit ended before any plan was found; allow more time")
    bound_s = min(best_s, left_open_s)
    proven = bound_s >= best_s * (1 - 1e-6)
    return BranchResult(best_plan, best_s, bound_s, proven, solved)


def _next_plan(
    bounds: PlanBounds, open_plans: np.ndarray, best_s: float, clock: Clock
) -> int | None:
    """Return the open plan with the least bound after tightening, or None if none can win."""
    while clock.left_s > 0:
        candidates = np.where(open_plans, bounds.bound_s, np.inf)
        index = int(np.argmin(candidates))
        if not candidates[index] < best_s * (1 - TIES):
            return None
        if bounds.tight[index]:
            return index
        bounds.tighten(index)
    return None


def _solve(
    tables: Sequence[ChunkTable],
    counts: np.ndarray,
    bounds: PlanBounds,
    index: int,
    best_s: float,
    clock: Clock,
) -> IdenticalResult:
    used = np.flatnonzero(bounds.plans[index]).tolist()
    model = IdenticalModel([tables[i] for i in used], counts, replicas=bounds.plans[index][used])
    limit_s = None if clock.limit_s is None else max(0.01, clock.left_s)
    at_most_s = best_s * (1 - TIES) if np.isfinite(best_s) else None
    return model.solve(limit_s, at_most_s, float(bounds.bound_s[index]))
