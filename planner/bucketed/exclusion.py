"""Exclusion: which of many plans cannot reach a step time, proven by prices."""

from __future__ import annotations

import numpy as np

from lobra.planner.bucketed.fluid import amounts, solve_rates
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.whole_micro_batches import WholeMicroBatches
from lobra.planner.clock import Clock

SURE = 1e-5  # relative margin against single precision
ANY_VALUE = 1e9  # of layouts that a price says nothing of; prices are about 1


class OpenPlans:
    """The plans that may still be faster than the best known.

    A price per sequence of each bucket excludes at step time T every plan whose replicas cannot
    reach the batch's value: ``sum_i p_i V_i < sum_j d_j price_j``, V_i the most value one replica
    of layout i can have within T. Prices come from the fluid relaxation of some plan, the batch's
    value then that of whole micro-batches, or from its column generation.

    Attributes
    ----------
    plans
        int32 [open plans, candidates].
    theta
        float32 [open plans]: a lower bound on the share of its replicas each plan needs at the T
        last looked at; above 1 it would be excluded there.
    """

    def __init__(self, problem: Problem, plans: np.ndarray) -> None:
        self._problem = problem
        self.plans = plans
        self.theta = np.zeros(len(plans), dtype=np.float32)

    def at(self, step_time_s: float, clock: Clock, whole: bool = True) -> OpenPlans:
        """Return the plans that the fluid relaxation does not exclude at T, least theta first.

        ``whole`` micro-batches exclude more, for several times the price. What is excluded at T is
        excluded at every smaller T.
        """
        problem = self._problem
        counts = problem.counts
        used = np.flatnonzero(counts > 0)
        reach = np.stack([amounts(table, step_time_s) for table in problem.tables])
        with np.errstate(divide="ignore"):
            rates = 1.0 / reach
        plans = self.plans
        for bucket in used:
            plans = plans[(plans[:, reach[:, bucket] > 0] > 0).any(axis=1)]
        result = OpenPlans(problem, plans)
        batches = WholeMicroBatches(problem.tables, counts, step_time_s) if whole else None
        solved = np.zeros(len(plans), dtype=bool)
        while len(result.plans):
            waiting = np.where(solved, np.inf, result.theta)
            index = int(np.argmin(waiting))
            if not np.isfinite(waiting[index]) or clock.left_s <= 0:
                break
            solved[index] = True
            layouts = np.flatnonzero(result.plans[index])
            fluid = solve_rates(rates[layouts], result.plans[index][layouts], counts)
            prices = np.maximum(fluid.price, 0.0)
            values = (prices[None, :] * reach).max(axis=1)
            stays = result.exclude(values, float(prices @ counts))
            solved = solved[stays]
            if batches is None:
                continue
            # the same for the plans of these layouts alone, now that micro-batches are whole
            others = np.setdiff1d(np.arange(len(values)), layouts)
            values[others] = ANY_VALUE
            stays = result.exclude(values, batches.needed(values, prices, layouts))
            solved = solved[stays]
        order = np.argsort(result.theta, kind="stable")
        result.plans, result.theta = result.plans[order], result.theta[order]
        return result

    def exclude(self, values: np.ndarray, needed: float) -> np.ndarray:
        """Drop the plans with ``plan @ values < needed``; return bool [plans]: who stays."""
        reached = self.plans.astype(np.float32) @ values.astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            theta = needed / reached
        np.maximum(self.theta, np.nan_to_num(theta, nan=0.0, posinf=np.inf), out=self.theta)
        stays = self.theta <= 1 + SURE
        self.plans, self.theta = self.plans[stays], self.theta[stays]
        return stays
