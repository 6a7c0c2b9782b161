"""The fluid relaxation of one plan: sequences divisible, always at their best rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ortools.linear_solver import pywraplp

from lobra.common.errors import ConfigError
from lobra.planner.bucketed.time_table import TimeTable, longest_sequence_s

SECANT_STEPS = 6
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Fluid:
    """The optimum of the relaxation.

    Attributes
    ----------
    step_time_s
        A lower bound on the step time of every dispatch.
    share
        float64 [groups, R]: sequences of each bucket that each replica group takes.
    price
        float64 [R]: what a further sequence of the bucket costs; not scaled.
    """

    step_time_s: float
    share: np.ndarray
    price: np.ndarray


def amounts(table: TimeTable, step_time_s: float) -> np.ndarray:
    """Return float64 [R]: sequences of one bucket alone that a replica does in a step, at most.

    A micro-batch of time c costs the bubble (pp - 1) c once, so a replica whose longest one takes z
    has T - (pp - 1) z for its work: ``A_j(T) = max_z (T - (pp - 1) z) max_{c(b) <= z} b / c(b)``.
    A mix x of buckets then needs ``sum_j x_j / A_j(T) <= 1``: for every z its rates are worse.
    """
    bubbles = table.bubbles
    time_s = table.time_s[:, 1:]
    sizes = np.arange(1, time_s.shape[1] + 1)
    speed = sizes / time_s
    in_time = time_s * (1 + bubbles) <= step_time_s * (1 + 1e-12)
    if not bubbles:
        return step_time_s * np.where(in_time, speed, 0.0).max(axis=1)
    # micro-batch times need not grow with b: take the micro-batches in the order of their times
    order = np.argsort(time_s, axis=1, kind="stable")
    ordered = np.take_along_axis(time_s, order, axis=1)
    fastest = np.maximum.accumulate(np.take_along_axis(speed, order, axis=1), axis=1)
    possible = ordered * (1 + bubbles) <= step_time_s * (1 + 1e-12)
    left = step_time_s - bubbles * np.where(possible, ordered, 0.0)
    return np.where(possible, left * fastest, 0.0).max(axis=1)


def solve_rates(rates: np.ndarray, replicas: np.ndarray, counts: np.ndarray) -> Fluid:
    """Minimise T with ``sum_j rate_gj x_gj <= p_g T``, every sequence taken.

    ``rates`` is float64 [groups, R], seconds per sequence, inf where a bucket does not fit;
    ``replicas`` int [groups]; ``counts`` int [R].

    Raises
    ------
    ConfigError
        If a bucket with sequences fits no group.
    """
    groups, num_buckets = rates.shape
    used = counts > 0
    possible = np.isfinite(rates) & used[None, :]
    if (used & ~possible.any(axis=0)).any():
        raise ConfigError("a bucket fits no replica of the plan")
    share, price = np.zeros_like(rates), np.zeros(num_buckets)
    if not used.any():
        return Fluid(0.0, share, price)
    solver = pywraplp.Solver.CreateSolver("GLOP")
    infinity = solver.infinity()
    step = solver.NumVar(0.0, infinity, "")
    capacity = [solver.RowConstraint(-infinity, 0.0, "") for _ in range(groups)]
    for row, number in zip(capacity, replicas.tolist(), strict=True):
        row.SetCoefficient(step, -float(number))
    taken = {
        bucket: solver.RowConstraint(float(counts[bucket]), float(counts[bucket]), "")
        for bucket in np.flatnonzero(used).tolist()
    }
    pairs = list(zip(*(indices.tolist() for indices in np.nonzero(possible)), strict=True))
    variables = []
    for (group, bucket), rate in zip(pairs, rates[possible].tolist(), strict=True):
        variable = solver.NumVar(0.0, infinity, "")
        capacity[group].SetCoefficient(variable, rate)
        taken[bucket].SetCoefficient(variable, 1.0)
        variables.append(variable)
    solver.Objective().SetCoefficient(step, 1.0)
    solver.Objective().SetMinimization()
    status = solver.Solve()
    if status != pywraplp.Solver.OPTIMAL:
        raise RuntimeError(f"the fluid relaxation was not solved: GLOP's status {status}")
    share[possible] = [variable.solution_value() for variable in variables]
    for bucket, row in taken.items():
        price[bucket] = row.dual_value()
    weight = np.maximum([-row.dual_value() for row in capacity], 0.0)
    # any weights of the groups give a bound, so the solver's tolerances do not matter
    priced = np.where(possible, rates, 0.0) * weight[:, None]
    cheapest = np.where(possible, priced, np.inf)[:, used].min(axis=0)
    return Fluid(float(counts[used] @ cheapest / (replicas @ weight)), share, price)


def solve_fluid(tables: Sequence[TimeTable], replicas: np.ndarray, counts: np.ndarray) -> Fluid:
    """Return the relaxation of a plan: the greatest T shown impossible, its share and prices.

    Without pipelines one linear program is exact. With them the work a replica can do is not
    proportional to T (``amounts``); a few secant steps find where the replicas just suffice, and
    the bound is a T at which they were seen not to.

    Raises
    ------
    ConfigError
        If a bucket with sequences fits no group.
    """
    plain = solve_rates(np.stack([table.rate_s() for table in tables]), replicas, counts)
    if not any(table.bubbles for table in tables):
        return plain
    bound_s = max(plain.step_time_s, longest_sequence_s(tables, counts) * (1 - 1e-12))
    step_s, fluid = bound_s, plain
    for _ in range(SECANT_STEPS):
        rates = step_s / np.maximum(np.stack([amounts(table, step_s) for table in tables]), 1e-300)
        rates[rates > 1e200] = np.inf
        if (~np.isfinite(rates).any(axis=0) & (counts > 0)).any():
            step_s *= 1.01  # some sequence does not end in time: impossible
            bound_s = max(bound_s, step_s / 1.01)
            continue
        fluid = solve_rates(rates, replicas, counts)
        needed = fluid.step_time_s / step_s
        if needed > 1.0 + 1e-7:
            bound_s = max(bound_s, step_s)
        if abs(needed - 1.0) < TOLERANCE / 2:
            break
        # aim a little below the root, so that the last point is a proof
        step_s = max(bound_s, step_s * needed * (1 - TOLERANCE / 4))
    return Fluid(bound_s, fluid.share, fluid.price)
