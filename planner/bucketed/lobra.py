"""LobRA's planners: BALANCE, GROUP and PRUNE, by LobRA's own definition of the step time.

BALANCE chooses replicas and dispatch together (a MINLP); GROUP lets a bucket go only to the layouts
of the plan with the smallest sufficient capacity; PRUNE lists all plans and drops those whose
length-based estimate is more than 15 % above the best. In all of them the replicas of a layout are
identical.

The MINLP is solved by branching on the replicas: every choice of them is bounded by the fluid
relaxation, and SCIP solves the integer linear program that is left of those that could still be
best. That is exact, like one bilinear model in SCIP, and many times faster; the bilinear model
serves where there are too many choices to list.

Each takes 60 s at most, or the limit it is given, and then returns its best plan so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lobra.common.errors import ConfigError
from lobra.planner.bucketed.branch import BranchResult, best_first
from lobra.planner.bucketed.fluid_planner import FluidPlanner
from lobra.planner.bucketed.identical import IdenticalModel
from lobra.planner.bucketed.partitions import closed, count_closed, count_maximal, maximal
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.solvers import Solvers
from lobra.planner.bucketed.time_table import TimeTable, time_table
from lobra.planner.clock import Clock
from lobra.planner.outcome import Outcome, Progress, silent

MOST_PLANS = 2_000_000
PRUNE_SLACK = 0.15
DEFAULT_LIMIT_S = 60.0  # a plan is near its best long before; what follows is mostly proof


def balance(
    problem: Problem, time_limit_s: float | None = None, progress: Progress = silent
) -> Outcome:
    """Return the plan of LobRA's MINLP."""
    clock = _clock(time_limit_s)
    return _solve(problem, _tables(problem), "BALANCE", clock, progress)


def group(
    problem: Problem, time_limit_s: float | None = None, progress: Progress = silent
) -> Outcome:
    """Return the plan of the MINLP with length-based dispatch over each plan's own layouts."""
    clock = _clock(time_limit_s)
    return _solve(problem, _tables(problem), "GROUP", clock, progress)


def prune(
    problem: Problem, time_limit_s: float | None = None, progress: Progress = silent
) -> Outcome:
    """Return the best of the plans that pass LobRA's filter.

    Raises
    ------
    ConfigError
        If there are too many plans to list, or none takes every bucket.
    """
    clock = _clock(time_limit_s)
    tables = _tables(problem)
    number = count_maximal(problem.sizes, problem.num_gpus)
    if number > MOST_PLANS:
        raise ConfigError(
            f"PRUNE would have to list {number} plans of {len(tables)} layouts on "
            f"{problem.num_gpus} GPUs (at most {MOST_PLANS}); choose EXACT or BALANCE, or leave "
            f"fewer layouts (--proposal on, where it is off)"
        )
    plans = maximal(problem.sizes, problem.num_gpus)
    estimate = length_based_estimate_s(tables, problem.counts, plans, problem.sizes)
    if not np.isfinite(estimate).any():
        raise ConfigError("no plan of the candidate layouts takes every bucket")
    kept = plans[estimate <= (1 + PRUNE_SLACK) * estimate.min()]
    progress(f"{len(kept)} of {len(plans)} plans pass the filter")
    result = best_first(tables, problem.counts, kept, clock, progress)
    note = f"{len(kept)} of {len(plans)} plans passed the filter, {result.solved} were solved"
    return _outcome(problem, result, "PRUNE", clock, (note,))


def length_based_estimate_s(
    tables: Sequence[TimeTable], counts: np.ndarray, plans: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Return float64 [plans]: LobRA's filter value ``sum_i N_i T_i / N``; inf if impossible.

    With length-based dispatch every bucket goes to the deployed layouts of least sufficient
    capacity. T_i is what those need for their buckets at the rate of full micro-batches, shared in
    proportion to their speed; N_i are their GPUs, N all GPUs of the plan.
    """
    capacity = np.array([table.max_tokens for table in tables])
    classes = np.unique(capacity)
    member = capacity[:, None] == classes[None, :]
    full = np.stack([table.full_time_s() / np.maximum(table.limit, 1) for table in tables])
    speed = np.where(np.isfinite(full), 1.0 / full, 0.0)
    deployed = plans @ member > 0
    gpus = plans * sizes[None, :]
    total = gpus.sum(axis=1)
    class_time = np.zeros((len(plans), len(classes)))
    reach = np.stack([(speed[member[:, c]] > 0).any(axis=0) for c in range(len(classes))])
    impossible = np.zeros(len(plans), dtype=bool)
    for bucket in np.flatnonzero(counts):
        able = deployed & reach[:, bucket][None, :]
        home = np.argmax(able, axis=1)
        impossible |= ~able.any(axis=1)
        rate = np.zeros(len(plans))
        for c in range(len(classes)):
            here = home == c
            rate[here] = plans[here][:, member[:, c]] @ speed[member[:, c], bucket]
        time_s = np.divide(counts[bucket], rate, out=np.zeros(len(plans)), where=rate > 0)
        class_time[np.arange(len(plans)), home] += time_s
    class_gpus = gpus @ member
    estimate = (class_gpus * class_time).sum(axis=1) / total
    return np.where(impossible, np.inf, estimate)


def _clock(time_limit_s: float | None) -> Clock:
    return Clock(DEFAULT_LIMIT_S if time_limit_s is None else time_limit_s)


def _tables(problem: Problem) -> list[TimeTable]:
    """Return time tables whose full micro-batch is the memory's, as LobRA defines it."""
    return [
        time_table(c.layout, c.max_tokens, problem.buckets, problem.cost_model)
        for c in problem.candidates
    ]


def _solve(
    problem: Problem,
    tables: list[TimeTable],
    name: str,
    clock: Clock,
    progress: Progress,
) -> Outcome:
    by_length = name == "GROUP"
    number, listed = (count_closed, closed) if by_length else (count_maximal, maximal)
    if number(problem.sizes, problem.num_gpus) <= MOST_PLANS:
        plans = listed(problem.sizes, problem.num_gpus)
        result = best_first(tables, problem.counts, plans, clock, progress, by_length)
        note = f"{len(plans)} plans, {result.solved} of them solved in SCIP"
        return _outcome(problem, result, name, clock, (note,))
    start = FluidPlanner(problem, tables).minimum(upper_s=1e6, clock=clock.part(1 / 3))
    only = start.replicas[None, :]
    nearest = best_first(tables, problem.counts, only, clock.part(1 / 2), progress, by_length)
    model = IdenticalModel(
        tables, problem.counts, num_gpus=problem.num_gpus, length_based=by_length
    )
    progress("too many plans to list: solving the bilinear model")
    with Solvers(1) as solvers:
        left_s = max(1.0, clock.left_s)
        running = solvers.submit(lambda: model, left_s, nearest.objective_s, start.step_time_s)
        found = running.result()
    bound_s = min(max(found.bound_s, start.step_time_s), nearest.objective_s)
    if found.replicas is not None and found.objective_s < nearest.objective_s:
        best = BranchResult(found.replicas, found.objective_s, bound_s, found.proven, 1)
    else:
        best = BranchResult(nearest.replicas, nearest.objective_s, bound_s, found.proven, 1)
    return _outcome(problem, best, name, clock, ("too many plans to list: bilinear model",))


def _outcome(
    problem: Problem, result: BranchResult, name: str, clock: Clock, notes: tuple[str, ...]
) -> Outcome:
    plan = problem.plan(result.replicas)
    time_s = problem.evaluate(plan).step_time_s
    if not result.proven:
        gap = 1.0 - result.bound_s / result.objective_s
        notes = (
            *notes,
            f"stopped after {clock.elapsed_s:.0f} s with the best plan so far, --time-limit gives "
            f"it more: its own objective may fall by at most {gap:.1%}",
        )
    # its bound holds for its own definition only; the exact evaluator allows more
    return Outcome(
        plan,
        time_s,
        0.0,
        name,
        clock.elapsed_s,
        objective_s=result.objective_s,
        proven=bool(result.proven),
        complete=bool(result.proven),
        notes=notes,
    )
