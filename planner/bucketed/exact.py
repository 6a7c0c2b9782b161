"""EXACT: a plan, a lower bound no plan can beat, and the gap between them.

What the bound covers: every plan of the candidate layouts on the given GPUs, and every way to cut
its sequences, each padded to its bucket, into micro-batches. It comes from the fluid relaxation
with whole replicas, then, where all plans can be listed, from excluding them one by one at a step
time T: by prices of the fluid relaxation, and those that are left by column generation.

What the plan comes from: the relaxation's replicas and their neighbours, dispatched; then column
generation's patterns rounded by an integer program; each followed by local search.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lobra.common.errors import ConfigError
from lobra.planner.bucketed import homogeneous
from lobra.planner.bucketed.columns import Budget
from lobra.planner.bucketed.exclusion import OpenPlans
from lobra.planner.bucketed.fluid import amounts
from lobra.planner.bucketed.fluid_planner import CUT_SLACK, Cut, FluidPlanner
from lobra.planner.bucketed.neighbours import promising
from lobra.planner.bucketed.partitions import count_maximal, maximal
from lobra.planner.bucketed.polish import polish, round_any
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.search import Search, key_of
from lobra.planner.clock import Clock
from lobra.planner.outcome import Outcome, Progress, silent

MOST_LISTED = 20_000
PROOF_TICKS = 8192
PROOF_STEPS = (0.0095, 0.006, 0.004, 0.0025, 0.0015, 0.001)
TRIED_AT_ONCE = 24
LARGE_GAP = 0.02  # a gap at which neighbours of the best plan are tried before proofs
FEW_GPUS = 128  # beyond, so are they whatever the gap
MOST_POLISHES = 40
RELAXATION_TOLERANCE = 2e-4  # relative
CLIMBING = 0.2  # share of the time left for neighbours of the best plan
POLISHED = 4e-3  # how much slower than another plan one is polished first that never was


def default_limit_s(num_gpus: int) -> float:
    """Return the seconds EXACT takes at most when no limit is given."""
    if num_gpus <= 64:
        return 4.5
    return 12.0 if num_gpus <= 256 else 35.0


def solve(
    problem: Problem,
    time_limit_s: float | None = None,
    progress: Progress = silent,
    *,
    effort: float = 1.0,
) -> Outcome:
    """Return the best plan found, a certified lower bound and near-best alternatives.

    Stops at a gap of 0.1 % or at the time limit; there is always a plan and a bound. The default
    limit is 4.5 s of processor time up to 64 GPUs, 12 s up to 256 and 35 s beyond, all times
    ``effort``; one that is given is wall-clock time.

    Raises
    ------
    ConfigError
        If no replica that holds the longest bucket can be placed.
    """
    limit_s = effort * default_limit_s(problem.num_gpus) if time_limit_s is None else time_limit_s
    search = Search(problem, Clock(limit_s, processor=time_limit_s is None), progress)
    start = homogeneous.find(problem)
    if start is None:  # then no plan has a replica that holds the longest bucket
        raise ConfigError(
            f"no layout that holds {problem.longest} tokens can be "
            f"placed on {problem.num_gpus} GPUs in nodes of {problem.gpus_per_node}"
        )
    search.note(problem.fleet.replicas_of(start.plan), start.step_time_s)
    relaxation = FluidPlanner(problem)
    relaxed = relaxation.minimum(search.best_s, RELAXATION_TOLERANCE / effort**2, search.clock)
    search.prove(relaxed.step_time_s)
    if not search.proven and relaxed.replicas.any():  # whatever time is left
        search.try_plan(problem.fleet.filled(relaxed.replicas))
    if count_maximal(problem.sizes, problem.num_gpus) <= MOST_LISTED:
        _search_listed(search)
    else:
        _search_near(search, relaxation)
    order = sorted(
        (time_s, key) for key, time_s in search.times.items() if time_s < search.best_s * 1.02
    )
    plans = [problem.plan(np.array(key)) for _, key in order]
    notes: tuple[str, ...] = ()
    complete = search.proven or search.clock.left_s > 0
    if not complete:
        notes = (f"stopped after {search.clock.elapsed_s:.1f} s; --time-limit gives it more",)
    return Outcome(
        plans[0],
        search.best_s,
        search.bound_s,
        "EXACT",
        search.clock.elapsed_s,
        proven=search.proven,
        complete=complete,
        notes=notes,
        alternatives=tuple(zip(plans, (time_s for time_s, _ in order), strict=True))[:8],
    )


def _search_listed(search: Search) -> None:
    """Search where all plans can be listed."""
    problem = search.problem
    everything = OpenPlans(problem, maximal(problem.sizes, problem.num_gpus))
    open_plans = everything.at(search.best_s * (1 - 1e-9), search.clock, whole=False)
    for replicas in open_plans.plans[:TRIED_AT_ONCE]:
        if search.done():
            return
        search.try_plan(replicas.astype(np.int64))
    _close_gap(search, lambda step_s: _survivor_of_list(search, open_plans, step_s))


def _search_near(search: Search, relaxation: FluidPlanner) -> None:
    """Search where plans cannot be listed: relaxed plans of several T, then those near the best."""
    problem = search.problem
    for slack in (0.0005, 0.002, 0.004, 0.008):
        if search.done():
            return
        replicas = relaxation.gpus(search.bound_s * (1 + slack), min(3.0, search.clock.left_s))
        if replicas is not None and replicas.any():
            search.try_plan(problem.fleet.filled(replicas))
    if problem.num_gpus > FEW_GPUS:
        round_any(search)
    if problem.num_gpus > FEW_GPUS or search.gap > LARGE_GAP:
        _climb(search)
    _close_gap(search, lambda step_s: _survivor_of_cuts(search, relaxation, step_s))


def _climb(search: Search) -> None:
    """Go to better neighbours of the best plan while there are any, for a fifth of the time."""
    clock = search.clock.part(CLIMBING)
    while not search.done() and clock.left_s > 0:
        centre, before_s = search.best_plans(1)[0], search.best_s
        for replicas in promising(search, centre):
            if search.done() or clock.left_s <= 0:
                return
            if search.try_plan(replicas) < before_s * (1 - 1e-4):
                break
        if search.best_s >= before_s * (1 - 1e-4):
            return


def _close_gap(search: Search, survivor_at: Callable[[float], np.ndarray | None]) -> None:
    """Prove step times ever nearer to the best impossible; polish the plans that resist.

    ``survivor_at(T)`` returns a plan not excluded at T, None if there is none, zeros if undecided.
    """
    seed = 0
    for step in PROOF_STEPS:
        while not search.done():
            step_s, before_s = search.best_s * (1 - step), search.best_s
            if step_s <= search.bound_s * (1 + 1e-6):
                break
            survivor = survivor_at(step_s)
            if survivor is None:
                search.prove(step_s)
                break
            if not survivor.any():
                return
            search.try_plan(survivor)
            _prove_between(search, survivor_at, step_s, 8e-3)
            seed += 1
            polish(search, _to_polish(search, survivor), step_s, seed, roundings=1)
            if search.best_s > before_s * (1 - 1e-5):
                _prove_between(search, survivor_at, step_s, 1e-3)
                break
    while not search.done():
        before = seed
        for replicas in search.best_plans(3):
            seed += 1
            polish(search, replicas, max(search.bound_s, search.best_s * (1 - 0.005)), seed)
        if seed == before or seed > MOST_POLISHES:
            return


def _to_polish(search: Search, survivor: np.ndarray) -> np.ndarray:
    """Return the survivor or one of the best plans: the one with most hope, not yet polished much.

    Hope is the middle of a plan's best time and its own lower bound.
    """

    def hope_s(replicas: np.ndarray) -> float:
        key = key_of(replicas)
        middle_s = 0.5 * (search.times[key] + search.bounds.get(key, search.bound_s))
        return middle_s * (1 + POLISHED * search.polishes[key])

    return min([survivor, *search.best_plans(3)], key=hope_s)


def _prove_between(
    search: Search,
    survivor_at: Callable[[float], np.ndarray | None],
    upper_s: float,
    tolerance: float,
) -> None:
    """Raise the bound by bisection between itself and a T at which a plan survives."""
    low, high = search.bound_s, upper_s
    while high - low > tolerance * high and not search.done():
        middle = 0.5 * (low + high)
        if survivor_at(middle) is None:
            low = middle
            search.prove(middle)
        else:
            high = middle


def _survivor_of_list(search: Search, open_plans: OpenPlans, step_s: float) -> np.ndarray | None:
    """Return a listed plan that column generation does not exclude at T; None if there is none.

    Zeros if time runs out before either.
    """
    problem = search.problem
    here = open_plans.at(step_s, search.clock)
    reach = np.stack([amounts(table, step_s) for table in problem.tables])
    while len(here.plans):
        if search.clock.left_s <= 0:
            return np.zeros(len(problem.candidates), dtype=np.int64)
        replicas = here.plans[0].astype(np.int64)
        cut = _cut(search, replicas, reach, step_s)
        if cut is None:
            return replicas
        here.plans, here.theta = here.plans[1:], here.theta[1:]
        here.exclude(cut.values, cut.needed)
    return None


def _survivor_of_cuts(search: Search, relaxation: FluidPlanner, step_s: float) -> np.ndarray | None:
    """Return a plan that neither the relaxation nor columns exclude at T; None if there is none.

    A plan of the relaxation is asked for its columns; if those prove T impossible for it, their
    prices become a cut for all plans. Zeros if time runs out before either.
    """
    problem = search.problem
    reach = np.stack([amounts(table, step_s) for table in problem.tables])
    cuts: list[Cut] = []
    while search.clock.left_s > 0:
        replicas = relaxation.gpus(step_s, max(0.5, search.clock.left_s), cuts)
        if replicas is None or not replicas.any():
            return replicas
        cut = _cut(search, replicas, reach, step_s)
        if cut is None:
            return replicas
        cuts.append(cut)
    return np.zeros(len(problem.candidates), dtype=np.int64)


def _cut(search: Search, replicas: np.ndarray, reach: np.ndarray, step_s: float) -> Cut | None:
    """Return a cut that excludes a plan at T, by its columns; None if they do not."""
    problem = search.problem
    layouts = np.flatnonzero(replicas).tolist()
    budget = Budget.of_plan(replicas[layouts])
    found = search.generate(
        layouts, budget, step_s, rounding="down", ticks=PROOF_TICKS, stop_at_proof=True
    )
    if not np.isfinite(found.bound):  # a bucket fits no layout of the plan in time
        fits = (reach[layouts] > 0).any(axis=0) | (problem.counts == 0)
        bucket = int(np.argmin(fits))
        return Cut(np.where(reach[:, bucket] > 0, 1.0, 0.0), 1.0)
    if found.bound <= 1 + 2 * CUT_SLACK:
        return None
    values = (found.prices[None, :] * reach).max(axis=1)
    values[layouts] = np.minimum(values[layouts], found.values)
    return Cut(values, float(found.prices @ problem.counts))
