"""Best first over plans: cheap bounds order them, SCIP solves those that could still win."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial

import numpy as np

from lobra.common.errors import ConfigError
from lobra.planner.bucketed.fluid import solve_rates
from lobra.planner.bucketed.identical import IdenticalModel, IdenticalResult
from lobra.planner.bucketed.solvers import Solvers
from lobra.planner.bucketed.time_table import TimeTable, by_length
from lobra.planner.clock import Clock
from lobra.planner.outcome import Progress, silent

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
    the most value a replica of layout i earns per second. With ``length_based`` only the buckets
    count that the plan's layouts may take, which is the same for all plans of the same capacities.
    """

    def __init__(
        self,
        tables: Sequence[TimeTable],
        counts: np.ndarray,
        plans: np.ndarray,
        length_based: bool = False,
    ) -> None:
        self._tables, self._counts, self.plans = tables, counts, plans
        self._plans_float = plans.astype(np.float32)
        self.bound_s = np.zeros(len(plans))
        self.tight = np.zeros(len(plans), dtype=bool)
        self._kinds = _kinds_by_length(tables, plans) if length_based else [_everything(tables)]
        self._kind_of = np.zeros(len(plans), dtype=np.int64)
        for number, kind in enumerate(self._kinds):
            self._kind_of[kind.members] = number
            some = plans[kind.members] > 0
            bound_s = np.zeros(len(some))
            for bucket in np.flatnonzero(counts):
                # infinite where no layout of the plan may take the bucket
                alone_s = kind.alone_s[:, bucket][None, :]
                best_s = np.where(some, alone_s, np.inf).min(axis=1)
                np.maximum(bound_s, best_s, out=bound_s)
            self.bound_s[kind.members] = bound_s

    def tighten(self, index: int) -> None:
        """Solve the fluid relaxation of one plan and let its prices raise all bounds."""
        plan = self.plans[index]
        used = np.flatnonzero(plan).tolist()
        rates = self._kinds[self._kind_of[index]].rates_s[used]
        fluid = solve_rates(rates, plan[used], self._counts)
        self.bound_s[index] = max(self.bound_s[index], fluid.step_time_s * (1 - 1e-9))
        self.tight[index] = True
        price = np.maximum(fluid.price, 0.0)
        worth = float(price @ self._counts)
        for kind in self._kinds:
            finite = np.isfinite(kind.rates_s)
            earned = np.where(finite, price[None, :] / kind.rates_s, 0.0).max(axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                bound = worth / (self._plans_float[kind.members] @ earned.astype(np.float32))
            # single precision errs by 1e-6 at most; ten times that is given away
            bound_s = np.nan_to_num(bound.astype(np.float64), nan=0.0, posinf=np.inf) * (1 - 1e-5)
            self.bound_s[kind.members] = np.maximum(self.bound_s[kind.members], bound_s)


@dataclass(frozen=True, eq=False)
class _Kind:
    """Plans whose layouts may take the same buckets, and what those cost there.

    ``members``: the plans, an index into their list; ``rates_s``, ``alone_s`` float64
    [candidates, R]: seconds per sequence at best, and of one sequence with the pipeline's bubble;
    infinite where the layout may not take the bucket.
    """

    members: np.ndarray | slice
    rates_s: np.ndarray
    alone_s: np.ndarray


def _everything(tables: Sequence[TimeTable]) -> _Kind:
    rates_s = np.stack([table.rate_s() for table in tables])
    alone_s = np.stack([table.time_s[:, 1] * (1 + table.bubbles) for table in tables])
    return _Kind(slice(None), rates_s, alone_s)


def _kinds_by_length(tables: Sequence[TimeTable], plans: np.ndarray) -> list[_Kind]:
    """Return one kind per set of deployed capacities."""
    capacity = np.array([table.max_tokens for table in tables])
    classes = np.unique(capacity)
    deployed = np.stack([(plans[:, capacity == c] > 0).any(axis=1) for c in classes], axis=1)
    sets, kind_of = np.unique(deployed, axis=0, return_inverse=True)
    order = np.argsort(kind_of.ravel(), kind="stable")
    starts = np.searchsorted(kind_of.ravel()[order], np.arange(len(sets) + 1))
    whole = _everything(tables)
    kinds = []
    for number, of_classes in enumerate(sets):
        among = np.flatnonzero(np.isin(capacity, classes[of_classes])).tolist()
        limited = by_length([tables[i] for i in among])
        allowed = np.zeros(whole.rates_s.shape, dtype=bool)
        allowed[among] = np.stack([table.limit > 0 for table in limited])
        rates_s = np.where(allowed, whole.rates_s, np.inf)
        alone_s = np.where(allowed, whole.alone_s, np.inf)
        kinds.append(_Kind(order[starts[number] : starts[number + 1]], rates_s, alone_s))
    return kinds


def best_first(
    tables: Sequence[TimeTable],
    counts: np.ndarray,
    plans: np.ndarray,
    clock: Clock,
    progress: Progress = silent,
    length_based: bool = False,
) -> BranchResult:
    """Return the plan with the least step time by LobRA's definition.

    With ``length_based`` a bucket goes only to the plan's layouts of least sufficient capacity.
    Plans are taken in the order of their bounds; SCIP solves their dispatch, only for times below
    the best so far, one per core. It ends when no bound is below the best: then that is proven.

    Raises
    ------
    ConfigError
        If no plan takes every bucket.
    """
    bounds = PlanBounds(tables, counts, plans, length_based)
    if not np.isfinite(bounds.bound_s).any():
        raise ConfigError("no plan of the candidate layouts takes every bucket")
    best_s, best_plan = np.inf, None
    open_plans = np.isfinite(bounds.bound_s)
    left_open_s = np.inf
    solved = 0
    workers = max(1, os.cpu_count() or 1)
    running: dict[Future[IdenticalResult], int] = {}
    with Solvers(workers) as solvers:
        while True:
            while len(running) < workers and clock.left_s > 0:
                index = _next_plan(bounds, open_plans, best_s, clock)
                if index is None:
                    break
                open_plans[index] = False
                used = np.flatnonzero(bounds.plans[index]).tolist()
                build = partial(
                    IdenticalModel,
                    [tables[i] for i in used],
                    counts,
                    replicas=bounds.plans[index][used],
                    length_based=length_based,
                )
                limit_s = None if clock.limit_s is None else max(0.01, clock.left_s)
                at_most_s = best_s * (1 - TIES) if np.isfinite(best_s) else None
                at_least_s = float(bounds.bound_s[index])
                running[solvers.submit(build, limit_s, at_most_s, at_least_s)] = index
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
    proven = bool(bound_s >= best_s * (1 - 1e-6))
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
