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
from lobra.planner.bucketed.identical import IdenticalModel, IdenticalResult, replica_cost_s
from lobra.planner.bucketed.solvers import Solvers
from lobra.planner.bucketed.time_table import TimeTable, by_length
from lobra.planner.clock import Clock
from lobra.planner.outcome import Progress, silent

TIES = 1e-9  # relative: a plan this close to the best is not searched further
SHARE, LEAST_SHARE_S = 0.2, 0.5  # of the time limit, that a plan's first try may take
TELL_EVERY_S = 2.0


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

    def tighten(self, index: int) -> float:
        """Solve the fluid relaxation of one plan and let its prices raise all bounds.

        Returns the step time of the plan, by LobRA's definition, with the relaxation's dispatch
        rounded up: each replica of a layout takes its share of every bucket.
        """
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
        per_replica = np.ceil(fluid.share / plan[used][:, None] - 1e-9).astype(np.int64)
        short = np.flatnonzero(plan[used] @ per_replica < self._counts)  # by the tolerances
        per_replica[fluid.share.argmax(axis=0)[short], short] += 1
        tables = [self._tables[i] for i in used]
        return max(replica_cost_s(*pair) for pair in zip(tables, per_replica, strict=True))


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
    Under a time limit a plan that takes long waits until the others have been tried; when the limit
    ends, the best so far is returned.

    Raises
    ------
    ConfigError
        If no plan takes every bucket.
    """
    search = _Search(PlanBounds(tables, counts, plans, length_based), progress)
    search.begin()
    bounds = search.bounds
    workers = max(1, os.cpu_count() or 1)
    running: dict[Future[IdenticalResult], int] = {}
    with Solvers(workers) as solvers:
        while True:
            while len(running) < workers and clock.left_s > 0:
                index = search.next_plan(clock)
                if index is None:
                    break
                used = np.flatnonzero(bounds.plans[index]).tolist()
                build = partial(
                    IdenticalModel,
                    [tables[i] for i in used],
                    counts,
                    replicas=bounds.plans[index][used],
                    length_based=length_based,
                )
                limit_s = None if clock.limit_s is None else search.share_s(index, clock)
                at_least_s = float(bounds.bound_s[index])
                running[solvers.submit(build, limit_s, search.wanted_s, at_least_s)] = index
            if not running:
                break
            done, _ = wait(running, timeout=TELL_EVERY_S, return_when=FIRST_COMPLETED)
            for future in done:
                search.note(running.pop(future), future.result())
            search.tell()
    return search.result()


class _Search:
    """Plans that are open, how often each was tried, and the best dispatch found so far."""

    def __init__(self, bounds: PlanBounds, progress: Progress) -> None:
        self.bounds = bounds
        self._progress = progress
        self._open = np.isfinite(bounds.bound_s)
        self._tries = np.zeros(len(bounds.plans), dtype=np.int64)
        self._best_s, self._best = np.inf, -1
        self._solved = 0

    def begin(self) -> None:
        """Find a first dispatch, whatever time there is.

        Raises
        ------
        ConfigError
            If no plan takes every bucket.
        """
        if not self._open.any():
            raise ConfigError("no plan of the candidate layouts takes every bucket")
        self._tighten(int(np.argmin(self.bounds.bound_s)))

    @property
    def wanted_s(self) -> float:
        """Only a step time below it makes a plan the best."""
        return self._best_s * (1 - TIES)

    def next_plan(self, clock: Clock) -> int | None:
        """Return the plan to solve next, which is then not open; None if none can win.

        Of those tried least, the one with the least bound, after tightening.
        """
        while clock.left_s > 0:
            able = self._open & (self.bounds.bound_s < self.wanted_s)
            if not able.any():
                return None
            able &= self._tries == self._tries[able].min()
            index = int(np.argmin(np.where(able, self.bounds.bound_s, np.inf)))
            if self.bounds.tight[index]:
                self._open[index] = False
                return index
            self._tighten(index)
        return None

    def share_s(self, index: int, clock: Clock) -> float:
        """Return the seconds a plan may take: a part of the limit, more with every try."""
        assert clock.limit_s is not None
        share_s = max(LEAST_SHARE_S, SHARE * clock.limit_s) * 2.0 ** self._tries[index]
        return float(max(0.01, min(share_s, clock.left_s)))

    def note(self, index: int, result: IdenticalResult) -> None:
        """Take over what SCIP found of a plan; it stays open if that was not all."""
        self._solved += result.proven
        self._improve(index, result.objective_s)
        if not result.proven:
            self._tries[index] += 1
            self._open[index] = True
            self.bounds.bound_s[index] = max(self.bounds.bound_s[index], result.bound_s)

    def tell(self) -> None:
        """Say how far the search is."""
        left = int((self._open & (self.bounds.bound_s < self.wanted_s)).sum())
        self._progress(f"{self._best_s:.4g} s so far; {self._solved} plans solved, {left} open")

    def result(self) -> BranchResult:
        """Return the best plan and what is proven of the others."""
        left_s = float(self.bounds.bound_s[self._open].min(initial=np.inf))
        bound_s = min(self._best_s, left_s)
        proven = bound_s >= self._best_s * (1 - 1e-6)
        replicas = self.bounds.plans[self._best].astype(np.int64)
        return BranchResult(replicas, self._best_s, bound_s, proven, self._solved)

    def _tighten(self, index: int) -> None:
        self._improve(index, self.bounds.tighten(index))

    def _improve(self, index: int, objective_s: float) -> None:
        if objective_s < self._best_s:
            self._best_s, self._best = objective_s, index
