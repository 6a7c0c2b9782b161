"""EXACT: a plan, a lower bound no plan can beat, and the gap between them.

What the bound covers: every plan of the candidate layouts on the given GPUs, and every way to cut
its sequences, each padded to its bucket, into micro-batches. It comes from the fluid relaxation
with whole replicas, then, where all plans can be listed, from excluding them one by one at a step
time T: by prices of the fluid relaxation, and those that are left by column generation.

What the plan comes from: the relaxation's skeleton and its neighbours, dispatched; then column
generation's patterns rounded by an integer program; each followed by local search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from planner.clock import Clock
from planner.columns import Budget, generate
from planner.fluid import amounts, solve_rates
from planner.plan import Plan
from planner.planners import homogeneous
from planner.planners.base import Outcome, Problem, Progress, silent
from planner.planners.exclusion import OpenPlans
from planner.planners.partitions import count_maximal, maximal
from planner.planners.relaxation import CUT_SLACK, Cut, FluidPlanner
from planner.rounding import choose, realise

MOST_PLANS = 2_000_000
TARGET_GAP = 1e-3
PROOF_TICKS = 8192
ROUNDING_TICKS = 4096
PROOF_STEPS = (0.0095, 0.006, 0.004, 0.0025, 0.0015, 0.001)
TRIED_AT_ONCE = 24


def default_limit_s(num_gpus: int) -> float:
    """Return the seconds EXACT takes at most when no limit is given."""
    if num_gpus <= 64:
        return 4.0
    return 12.0 if num_gpus <= 256 else 35.0


@dataclass(eq=False)
class _State:
    """The search's knowledge: plans with their best times, and the bound."""

    problem: Problem
    clock: Clock
    progress: Progress
    bound_s: float = 0.0
    best_s: float = np.inf
    times: dict[tuple[int, ...], float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        return 1.0 - self.bound_s / self.best_s

    def note(self, replicas: np.ndarray, time_s: float) -> None:
        key = tuple(int(number) for number in replicas)
        self.times[key] = min(time_s, self.times.get(key, np.inf))
        if time_s < self.best_s:
            self.best_s = time_s
            self.report()

    def prove(self, bound_s: float) -> None:
        if bound_s > self.bound_s:
            self.bound_s = min(bound_s, self.best_s)
            self.report()

    def report(self) -> None:
        self.progress(
            f"{self.best_s:.4f} s, bound {self.bound_s:.4f} s, gap {100 * self.gap:.2f} %"
        )

    def done(self) -> bool:
        return self.gap <= TARGET_GAP or self.clock.left_s <= 0

    def try_plan(self, replicas: np.ndarray) -> float:
        """Dispatch the batch over a plan not tried yet; return its best time."""
        key = tuple(int(number) for number in replicas)
        if key not in self.times:
            plan = self.problem.plan(replicas)
            if not self.problem.can_place(plan):
                self.times[key] = np.inf
            else:
                self.note(replicas, self.problem.evaluate(plan).step_time_s)
        return self.times[key]

    def best_plans(self, number: int) -> list[np.ndarray]:
        order = sorted(self.times, key=lambda key: (self.times[key], key))
        return [np.array(key, dtype=np.int64) for key in order[:number] if self.times[key] < np.inf]


def solve(
    problem: Problem, time_limit_s: float | None = None, progress: Progress = silent
) -> Outcome:
    """Return the best plan found, a certified lower bound and near-best alternatives.

    Stops at a gap of 0.1 % or at the time limit (by default 4 s up to 64 GPUs, 12 s up to 256 and
    35 s beyond); there is always a plan and a bound.
    """
    limit_s = default_limit_s(problem.num_gpus) if time_limit_s is None else time_limit_s
    state = _State(problem, Clock(limit_s), progress)
    start = homogeneous.find(problem)
    if start is not None:
        state.note(_replicas_of(problem, start.plan), start.step_time_s)
    relaxation = FluidPlanner(problem)
    upper_s = state.best_s if np.isfinite(state.best_s) else _possible_s(relaxation)
    skeleton = relaxation.minimum(upper_s)
    state.prove(skeleton.step_time_s)
    state.try_plan(_filled(problem, skeleton.replicas))
    if count_maximal(problem.sizes, problem.num_gpus) <= MOST_PLANS:
        _search_listed(state)
    else:
        _search_near(state, relaxation)
    order = sorted(
        (time_s, key) for key, time_s in state.times.items() if time_s < state.best_s * 1.02
    )
    plans = [problem.plan(np.array(key)) for _, key in order]
    notes: tuple[str, ...] = ()
    if state.gap > TARGET_GAP and state.clock.left_s <= 0:
        notes = (f"stopped after {state.clock.elapsed_s:.1f} s; --time-limit gives it more",)
    return Outcome(
        plans[0],
        state.best_s,
        state.bound_s,
        "EXACT",
        state.clock.elapsed_s,
        proven=state.gap <= TARGET_GAP,
        notes=notes,
        alternatives=tuple(zip(plans, (time_s for time_s, _ in order), strict=True))[:8],
    )


def _search_listed(state: _State) -> None:
    """Search where all plans can be listed: exclude, try, exclude the rest by columns."""
    problem = state.problem
    everything = OpenPlans(problem, maximal(problem.sizes, problem.num_gpus))
    open_plans = everything.at(state.best_s * (1 - 1e-9), state.clock)
    for replicas in open_plans.plans[:TRIED_AT_ONCE]:
        if state.done():
            return
        state.try_plan(replicas.astype(np.int64))
    for step in PROOF_STEPS:
        if state.done():
            return
        step_s = state.best_s * (1 - step)
        if step_s <= state.bound_s:
            continue
        open_plans = open_plans.at(state.best_s * (1 - 1e-9), state.clock)
        survivors = _survivors(state, open_plans, step_s)
        if state.clock.left_s <= 0:
            return
        if not survivors:
            state.prove(step_s)
            continue
        before_s = state.best_s
        for replicas in survivors[:4]:
            state.try_plan(replicas)
            _polish(state, replicas, step_s)
        if state.best_s >= before_s * (1 - 1e-6):
            _prove_between(state, open_plans, step_s)
            break
    for replicas in state.best_plans(3):
        if not state.done():
            _polish(state, replicas, state.bound_s * 1.001)


def _prove_between(state: _State, open_plans: OpenPlans, upper_s: float) -> None:
    """Raise the bound by bisection between itself and a T at which plans survive."""
    low, high = state.bound_s, upper_s
    while high - low > 1e-3 * high and not state.done():
        middle = 0.5 * (low + high)
        if _survivors(state, open_plans, middle, stop_at_first=True) or state.clock.left_s <= 0:
            high = middle
        else:
            low = middle
            state.prove(middle)


def _survivors(
    state: _State, open_plans: OpenPlans, step_s: float, stop_at_first: bool = False
) -> list[np.ndarray]:
    """Return the plans that column generation does not exclude at T (all, if time runs out)."""
    problem = state.problem
    here = open_plans.at(step_s, state.clock)
    survivors: list[np.ndarray] = []
    reach = np.stack([amounts(table, step_s) for table in problem.tables])
    while len(here.plans):
        if state.clock.left_s <= 0:
            return [*survivors, *here.plans.astype(np.int64)]
        replicas = here.plans[0].astype(np.int64)
        layouts = np.flatnonzero(replicas)
        found = generate(
            [problem.tables[i] for i in layouts.tolist()],
            Budget.of_plan(replicas[layouts]),
            problem.counts,
            step_s,
            rounding="down",
            ticks=PROOF_TICKS,
            clock=state.clock,
            stop_at_proof=True,
        )
        excluded = found.bound > 1 + 1e-6
        if not excluded:
            survivors.append(replicas)
            if stop_at_first:
                return survivors
        if np.isfinite(found.bound):
            values = (found.prices[None, :] * reach).max(axis=1)
            values[layouts] = np.minimum(values[layouts], found.values)
            here.plans, here.theta = here.plans[1:], here.theta[1:]
            here.exclude(found.prices, values)
        else:
            here.plans, here.theta = here.plans[1:], here.theta[1:]
    return survivors


def _polish(state: _State, replicas: np.ndarray, step_s: float) -> None:
    """Look for a better dispatch of a plan: columns at T, rounded; T grows until they suffice."""
    problem = state.problem
    layouts = np.flatnonzero(replicas).tolist()
    tables = [problem.tables[i] for i in layouts]
    budget = Budget.of_plan(replicas[layouts])
    rounded = 0
    while rounded < 3 and step_s < state.best_s and not state.done():
        found = generate(
            tables,
            budget,
            problem.counts,
            step_s,
            rounding="up",
            ticks=ROUNDING_TICKS,
            clock=state.clock,
        )
        if found.theta > 1.0005:
            step_s *= 1.0005 + min(0.01, found.theta - 1.0)
            continue
        chosen = choose(found.columns, budget, problem.counts, found.prices, state.clock)
        rounded += 1
        if chosen is not None and len(chosen) > 0:
            full = [(layouts[owner], pattern) for owner, pattern in chosen]
            real = realise(problem.tables, problem.counts, full, 0.0, 100)
            if (real.replicas <= replicas).all():
                state.note(replicas, real.step_time_s)
        step_s *= 1.002


def _search_near(state: _State, relaxation: FluidPlanner) -> None:
    """Search where plans cannot be listed: skeletons for several T, then neighbours of the best."""
    problem = state.problem
    for slack in (0.0005, 0.002, 0.004, 0.006, 0.008, 0.012):
        if state.done():
            return
        replicas = relaxation.gpus(state.bound_s * (1 + slack), min(3.0, state.clock.left_s))
        if replicas is not None and replicas.any():
            state.try_plan(_filled(problem, replicas))
    _raise_bound(state, relaxation)
    while not state.done():
        centre, before_s = state.best_plans(1)[0], state.best_s
        for replicas in _promising(state, centre):
            if state.done():
                return
            if state.try_plan(replicas) < before_s * (1 - 1e-4):
                break
        if state.best_s >= before_s * (1 - 1e-4):
            break
    _raise_bound(state, relaxation)
    for replicas in state.best_plans(3):
        if not state.done():
            _polish(state, replicas, state.bound_s * 1.003)


def _raise_bound(state: _State, relaxation: FluidPlanner) -> None:
    """Raise the bound, step by step towards the best time, as far as no plan survives."""
    for step in PROOF_STEPS:
        step_s = state.best_s * (1 - step)
        if state.done():
            return
        if step_s <= state.bound_s:
            continue
        survivor = _survivor_of_cuts(state, relaxation, step_s)
        if survivor is None:
            state.prove(step_s)
            continue
        before_s = state.best_s
        if survivor.any() and not state.done():
            state.try_plan(survivor)
            _polish(state, survivor, step_s)
        if state.best_s >= before_s * (1 - 1e-6):
            return


def _survivor_of_cuts(state: _State, relaxation: FluidPlanner, step_s: float) -> np.ndarray | None:
    """Return a plan that neither the relaxation nor columns exclude at T; None if there is none.

    A plan of the relaxation is asked for its columns; if those prove T impossible for it, their
    prices become a cut for all plans. Zeros if time runs out before either.
    """
    problem = state.problem
    reach = np.stack([amounts(table, step_s) for table in problem.tables])
    cuts: list[Cut] = []
    while state.clock.left_s > 0:
        replicas = relaxation.gpus(step_s, max(0.5, state.clock.left_s), cuts)
        if replicas is None:
            return None
        if not replicas.any():
            break
        layouts = np.flatnonzero(replicas)
        found = generate(
            [problem.tables[i] for i in layouts.tolist()],
            Budget.of_plan(replicas[layouts]),
            problem.counts,
            step_s,
            rounding="down",
            ticks=PROOF_TICKS,
            clock=state.clock,
            stop_at_proof=True,
        )
        if found.bound <= 1 + 2 * CUT_SLACK or not np.isfinite(found.bound):
            return replicas if state.clock.left_s > 0 else np.zeros_like(replicas)
        values = (found.prices[None, :] * reach).max(axis=1)
        values[layouts] = np.minimum(values[layouts], found.values)
        cuts.append(Cut(values, float(found.prices @ problem.counts)))
    return np.zeros(len(problem.candidates), dtype=np.int64)


def _promising(state: _State, centre: np.ndarray) -> list[np.ndarray]:
    """Return neighbours of a plan not tried yet, by what the fluid relaxation needs of them."""
    problem = state.problem
    step_s = state.best_s
    reach = np.stack([amounts(table, step_s) for table in problem.tables])
    with np.errstate(divide="ignore"):
        rates = 1.0 / reach
    scored = []
    for replicas in _neighbours(centre, problem.sizes):
        key = tuple(replicas.tolist())
        layouts = np.flatnonzero(replicas)
        covered = (reach[layouts] > 0).any(axis=0) | (problem.counts == 0)
        if key in state.times or not covered.all():
            continue
        theta = solve_rates(rates[layouts], replicas[layouts], problem.counts).step_time_s
        if theta < 1.0:
            scored.append((theta, key))
        if state.clock.left_s <= 0:
            break
    return [np.array(key, dtype=np.int64) for _, key in sorted(scored)]


def _neighbours(replicas: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield plans with one layout's replicas exchanged for as many GPUs of another."""
    for source in np.flatnonzero(replicas).tolist():
        for target in range(len(sizes)):
            if target == source:
                continue
            step = int(np.lcm(sizes[source], sizes[target]))
            for times in (1, 2, 4):
                out, into = times * step // sizes[source], times * step // sizes[target]
                if out <= replicas[source]:
                    changed = replicas.copy()
                    changed[source] -= out
                    changed[target] += into
                    yield changed


def _filled(problem: Problem, replicas: np.ndarray) -> np.ndarray:
    """Use idle GPUs for more replicas: first of layouts already there, the largest first."""
    replicas = replicas.copy()
    left = problem.num_gpus - int(replicas @ problem.sizes)
    order = np.lexsort((-problem.sizes, replicas == 0))
    for index in order.tolist():
        number = left // int(problem.sizes[index])
        replicas[index] += number
        left -= number * int(problem.sizes[index])
    return replicas


def _possible_s(relaxation: FluidPlanner) -> float:
    """Return a step time at which the fluid relaxation has a plan."""
    step_s = max(relaxation.longest_s, 1e-3)
    while relaxation.gpus(step_s) is None:
        step_s *= 2.0
    return step_s


def _replicas_of(problem: Problem, plan: Plan) -> np.ndarray:
    groups = {group.layout: group.replicas for group in plan.groups}
    return np.array([groups.get(c.layout, 0) for c in problem.candidates], dtype=np.int64)
