"""EXACT's better dispatches: patterns rounded to whole replicas, and disturbed dispatches."""

from __future__ import annotations

import numpy as np

from lobra.planner.bucketed.columns import Budget
from lobra.planner.bucketed.dispatch import search_loads
from lobra.planner.bucketed.initial_loads import fluid_loads
from lobra.planner.bucketed.loads import micro_batches_of
from lobra.planner.bucketed.patterns import Pattern
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.resplit import MOST_SHAKEN, shake
from lobra.planner.bucketed.rounding import choose, diversify, realise
from lobra.planner.bucketed.search import Search, key_of

ROUNDING_TICKS = 2048
ROUNDINGS = 2
ROUNDINGS_ANY, ROOM_ANY = 3, 0.002
MOST_ROOM = 0.0065
SHAKING = 0.05  # share of the time left that disturbing a dispatch may take
SHAKE_TICKS, SHAKES = 2048, 8


def polish(
    search: Search, replicas: np.ndarray, step_s: float, seed: int, roundings: int = ROUNDINGS
) -> None:
    """Look for a better dispatch of a plan: columns at T, rounded; T grows until they suffice."""
    if search.times.get(key_of(replicas)) == np.inf:
        return  # it cannot be placed
    search.polishes[key_of(replicas)] += 1
    _shake(search, replicas, seed)
    problem = search.problem
    layouts = np.flatnonzero(replicas).tolist()
    tables = [problem.tables[i] for i in layouts]
    budget = Budget.of_plan(replicas[layouts])
    # whole replicas need some room: about a fifth of one
    room = min(MOST_ROOM, 0.2 / int(replicas.sum()))
    rounded = raises = 0
    while rounded < roundings and step_s < search.best_s and not search.done():
        found = search.generate(layouts, budget, step_s, rounding="up", ticks=ROUNDING_TICKS)
        # theta may stay at 1 however long the step, where one layout is just enough in number
        enough = found.theta <= 1.0 + 2e-4
        if not enough or (found.theta > 1.0 - 0.8 * room and raises < 2):
            raises += enough
            step_s *= 1.0 + max(2e-4, 0.6 * (found.theta - 1.0 + room))
            continue
        diversify(found, tables, problem.counts, step_s, ROUNDING_TICKS, seed, search.clock)
        chosen = choose(found.columns, budget, problem.counts, found.prices, search.clock)
        rounded += 1
        if chosen:
            owned = [(layouts[owner], pattern) for owner, pattern in chosen]
            full = _with_idle(problem, owned, replicas)
            rounds = max(200, 2 * len(full))
            time_s = realise(problem.tables, problem.counts, full, search.target_s, rounds)
            search.note(replicas, time_s)
        step_s = step_s * 1.002


def _shake(search: Search, replicas: np.ndarray, seed: int) -> None:
    """Look for a better dispatch of a plan from the dispatcher's, by random disturbances."""
    if int(replicas.sum()) > MOST_SHAKEN:
        return
    problem = search.problem
    layouts = np.flatnonzero(replicas)
    tables = [problem.tables[i] for i in layouts]
    start = fluid_loads(tables, replicas[layouts], problem.counts)
    search_loads(start.loads, start.bound_s)
    rng, clock = np.random.default_rng(seed), search.clock.part(SHAKING)
    while clock.left_s > 0 and not search.done():
        shake(start.loads, search.target_s, SHAKE_TICKS, SHAKES, rng)
        search.note(replicas, max(micro_batches_of(start.loads, start.tables)[1]))


def round_any(search: Search) -> None:
    """Round patterns mixed over all layouts within the GPUs: plan and dispatch at once."""
    problem = search.problem
    layouts = list(range(len(problem.candidates)))
    budget = Budget.of_gpus(problem.sizes, problem.num_gpus)
    clock = search.clock.part(0.4)
    step_s, rounded = search.bound_s * 1.002, 0
    while rounded < ROUNDINGS_ANY and step_s < search.best_s and clock.left_s > 0:
        found = search.generate(
            layouts, budget, step_s, rounding="up", ticks=ROUNDING_TICKS, clock=clock
        )
        if found.theta > 1.0 - ROOM_ANY:
            step_s *= 1.0 + max(1e-3, 0.6 * (found.theta - 1.0 + ROOM_ANY))
            continue
        chosen = choose(found.columns, budget, problem.counts, found.prices, clock)
        rounded += 1
        step_s *= 1.004
        if not chosen:
            continue
        replicas = problem.fleet.filled(np.bincount([i for i, _ in chosen], minlength=len(layouts)))
        full = _with_idle(problem, chosen, replicas)
        time_s = realise(problem.tables, problem.counts, full, search.target_s, 2 * len(full))
        if problem.fleet.can_place(problem.plan(replicas)):
            search.note(replicas, time_s)


def _with_idle(
    problem: Problem, chosen: list[tuple[int, Pattern]], replicas: np.ndarray
) -> list[tuple[int, Pattern]]:
    """Return the chosen patterns with empty ones for the replicas that have none."""
    idle = replicas - np.bincount([i for i, _ in chosen], minlength=len(replicas))
    none = Pattern(np.zeros(len(problem.counts), dtype=np.int64), 0.0, 0.0)
    return [*chosen, *((i, none) for i in range(len(replicas)) for _ in range(int(idle[i])))]
