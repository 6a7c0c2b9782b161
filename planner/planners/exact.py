"""EXACT: a plan, a lower bound no plan can beat, and the gap between them.

What the bound covers: every plan of the candidate layouts on the given GPUs, and every way to cut
its sequences, each padded to its bucket, into micro-batches. It comes from the fluid relaxation
with whole replicas, then, where all plans can be listed, from excluding them one by one at a step
time T: by prices of the fluid relaxation, and those that are left by column generation.

What the plan comes from: the relaxation's skeleton and its neighbours, dispatched; then column
generation's patterns rounded by an integer program; each followed by local search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from planner.clock import Clock
from planner.columns import Budget, Pool, generate
from planner.dispatch import search_loads
from planner.first import chunks_of, start_loads
from planner.fluid import amounts, solve_rates
from planner.patterns import Pattern
from planner.plan import Plan
from planner.planners import homogeneous
from planner.planners.base import Outcome, Problem, Progress, silent
from planner.planners.exclusion import OpenPlans
from planner.planners.partitions import count_maximal, maximal
from planner.planners.relaxation import CUT_SLACK, Cut, FluidPlanner
from planner.resplit import shake
from planner.rounding import choose, diversify, realise
from tasks.errors import ConfigError

MOST_LISTED = 20_000
TARGET_GAP = 1e-3
PROOF_TICKS = 8192
ROUNDING_TICKS = 4096
PROOF_STEPS = (0.0095, 0.006, 0.004, 0.0025, 0.0015, 0.001)
TRIED_AT_ONCE = 24
LARGE_GAP = 0.015  # a gap at which a better plan is looked for before a better bound
FEW_GPUS = 128  # beyond, neighbours of the best plan are tried before proofs
ROUNDINGS = 2
ROUNDINGS_ANY, ROOM_ANY = 3, 0.002
MOST_ROOM = 0.0065
MOST_POLISHES = 40
SHAKING = 0.15  # share of the time left that disturbing a dispatch may take
SHAKE_TICKS, SHAKES = 2048, 8


def default_limit_s(num_gpus: int) -> float:
    """Return the seconds EXACT takes at most when no limit is given."""
    if num_gpus <= 64:
        return 4.5
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

    def __post_init__(self) -> None:
        self.pool = Pool(len(self.problem.candidates))

    @property
    def gap(self) -> float:
        return 1.0 - self.bound_s / self.best_s

    @property
    def proven(self) -> bool:
        return self.gap <= TARGET_GAP * (1 + 1e-9)

    @property
    def target_s(self) -> float:
        """A step time near enough to the bound to look no further."""
        return self.bound_s * (1 + TARGET_GAP)

    def note(self, replicas: np.ndarray, time_s: float) -> None:
        key = tuple(int(number) for number in replicas)
        if self.times.get(key) == np.inf:
            return  # it cannot be placed
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
        return self.proven or self.clock.left_s <= 0

    def try_plan(self, replicas: np.ndarray) -> float:
        """Dispatch the batch over a plan not tried yet; return its best time."""
        key = tuple(int(number) for number in replicas)
        if key not in self.times:
            placed = self.placed(replicas)
            if placed is None:
                self.times[key] = np.inf
            elif placed is not replicas:
                self.times[key] = np.inf
                return self.try_plan(placed)
            else:
                time_s = self.problem.evaluate(self.problem.plan(replicas)).step_time_s
                self.note(replicas, time_s)
        return self.times[key]

    def placed(self, replicas: np.ndarray) -> np.ndarray | None:
        """Return the plan, or what is left of it when replicas go until it can be placed.

        Those with the most shards go first; None if what is left does not hold every bucket.
        """
        problem = self.problem
        left = replicas
        order = np.argsort([-c.layout.tp for c in problem.candidates], kind="stable")
        while not problem.can_place(problem.plan(left)):
            for index in order.tolist():
                fewer = left.copy()
                fewer[index] -= 1
                if left[index] and self.holds(fewer):
                    left = fewer
                    break
            else:
                return None
        return left

    def holds(self, replicas: np.ndarray) -> bool:
        """Return whether every bucket of the batch fits some replica."""
        longest = int(self.problem.buckets[self.problem.counts > 0].max())
        tokens = np.array([candidate.max_tokens for candidate in self.problem.candidates])
        return bool((tokens[replicas > 0] >= longest).any())

    def best_plans(self, number: int) -> list[np.ndarray]:
        order = sorted(self.times, key=lambda key: (self.times[key], key))
        return [np.array(key, dtype=np.int64) for key in order[:number] if self.times[key] < np.inf]


def solve(
    problem: Problem, time_limit_s: float | None = None, progress: Progress = silent
) -> Outcome:
    """Return the best plan found, a certified lower bound and near-best alternatives.

    Stops at a gap of 0.1 % or at the time limit; there is always a plan and a bound. The default
    limit is 4.5 s of processor time up to 64 GPUs, 12 s up to 256 and 35 s beyond; one that is
    given is wall-clock time.

    Raises
    ------
    ConfigError
        If no replica that holds the longest bucket can be placed.
    """
    limit_s = default_limit_s(problem.num_gpus) if time_limit_s is None else time_limit_s
    state = _State(problem, Clock(limit_s, processor=time_limit_s is None), progress)
    start = homogeneous.find(problem)
    if start is None:  # then no plan has a replica that holds the longest bucket
        raise ConfigError(
            f"no layout that holds {int(problem.buckets[problem.counts > 0].max())} tokens can be "
            f"placed on {problem.num_gpus} GPUs in nodes of {problem.gpus_per_node}"
        )
    state.note(_replicas_of(problem, start.plan), start.step_time_s)
    relaxation = FluidPlanner(problem)
    skeleton = relaxation.minimum(state.best_s, clock=state.clock)
    state.prove(skeleton.step_time_s)
    if not state.done() and skeleton.replicas.any():
        state.try_plan(_filled(problem, skeleton.replicas))
    if count_maximal(problem.sizes, problem.num_gpus) <= MOST_LISTED:
        _search_listed(state)
    else:
        _search_near(state, relaxation)
    order = sorted(
        (time_s, key) for key, time_s in state.times.items() if time_s < state.best_s * 1.02
    )
    plans = [problem.plan(np.array(key)) for _, key in order]
    notes: tuple[str, ...] = ()
    if not state.proven and state.clock.left_s <= 0:
        notes = (f"stopped after {state.clock.elapsed_s:.1f} s; --time-limit gives it more",)
    return Outcome(
        plans[0],
        state.best_s,
        state.bound_s,
        "EXACT",
        state.clock.elapsed_s,
        proven=state.proven,
        notes=notes,
        alternatives=tuple(zip(plans, (time_s for time_s, _ in order), strict=True))[:8],
    )


def _search_listed(state: _State) -> None:
    """Search where all plans can be listed."""
    problem = state.problem
    everything = OpenPlans(problem, maximal(problem.sizes, problem.num_gpus))
    open_plans = everything.at(state.best_s * (1 - 1e-9), state.clock)
    for replicas in open_plans.plans[:TRIED_AT_ONCE]:
        if state.done():
            return
        state.try_plan(replicas.astype(np.int64))
    _close_gap(state, lambda step_s: _survivor_of_list(state, open_plans, step_s))


def _search_near(state: _State, relaxation: FluidPlanner) -> None:
    """Search where plans cannot be listed: skeletons for several T, then neighbours of the best."""
    problem = state.problem
    for slack in (0.0005, 0.002, 0.004, 0.008):
        if state.done():
            return
        replicas = relaxation.gpus(state.bound_s * (1 + slack), min(3.0, state.clock.left_s))
        if replicas is not None and replicas.any():
            state.try_plan(_filled(problem, replicas))
    if problem.num_gpus > FEW_GPUS:
        _round_any(state)
        _climb(state)
    _close_gap(state, lambda step_s: _survivor_of_cuts(state, relaxation, step_s))


def _round_any(state: _State) -> None:
    """Round patterns mixed over all layouts within the GPUs: plan and dispatch at once."""
    problem = state.problem
    layouts = list(range(len(problem.candidates)))
    budget = Budget.of_gpus(problem.sizes, problem.num_gpus)
    clock = state.clock.part(0.4)
    step_s, rounded = state.bound_s * 1.002, 0
    while rounded < ROUNDINGS_ANY and step_s < state.best_s and clock.left_s > 0:
        found = generate(
            problem.tables,
            budget,
            problem.counts,
            step_s,
            rounding="up",
            ticks=ROUNDING_TICKS,
            clock=clock,
            columns=state.pool.columns(layouts, step_s),
        )
        state.pool.keep(layouts, found)
        if found.theta > 1.0 - ROOM_ANY:
            step_s *= 1.0 + max(1e-3, 0.6 * (found.theta - 1.0 + ROOM_ANY))
            continue
        chosen = choose(found.columns, budget, problem.counts, found.prices, clock)
        rounded += 1
        step_s *= 1.004
        if not chosen:
            continue
        replicas = np.bincount([i for i, _ in chosen], minlength=len(layouts))
        full = _with_idle(problem, chosen, _filled(problem, replicas))
        real = realise(problem.tables, problem.counts, full, state.target_s, 2 * len(full))
        if problem.can_place(problem.plan(real.replicas)):
            state.note(real.replicas, real.step_time_s)


def _with_idle(
    problem: Problem, chosen: list[tuple[int, Pattern]], replicas: np.ndarray
) -> list[tuple[int, Pattern]]:
    """Return the chosen patterns with empty ones for the replicas that have none."""
    idle = replicas - np.bincount([i for i, _ in chosen], minlength=len(replicas))
    none = Pattern(np.zeros(len(problem.counts), dtype=np.int64), 0.0, 0.0)
    return [*chosen, *((i, none) for i in range(len(replicas)) for _ in range(int(idle[i])))]


def _climb(state: _State) -> None:
    """Go to better neighbours of the best plan while there are any, for half of the time."""
    clock = state.clock.part(0.5)
    while not state.done() and clock.left_s > 0:
        centre, before_s = state.best_plans(1)[0], state.best_s
        for replicas in _promising(state, centre):
            if state.done() or clock.left_s <= 0:
                return
            if state.try_plan(replicas) < before_s * (1 - 1e-4):
                break
        if state.best_s >= before_s * (1 - 1e-4):
            return


def _close_gap(state: _State, survivor_at: Callable[[float], np.ndarray | None]) -> None:
    """Prove step times ever nearer to the best impossible; polish the plans that resist.

    ``survivor_at(T)`` returns a plan not excluded at T, None if there is none, zeros if undecided.
    """
    seed = 0
    if state.gap > LARGE_GAP:
        for replicas in state.best_plans(1):
            _polish(state, replicas, state.bound_s * (1 + LARGE_GAP), seed, roundings=1)
    for step in PROOF_STEPS:
        while not state.done():
            step_s, before_s = state.best_s * (1 - step), state.best_s
            if step_s <= state.bound_s * (1 + 1e-6):
                break
            survivor = survivor_at(step_s)
            if survivor is None:
                state.prove(step_s)
                break
            if not survivor.any():
                return
            state.try_plan(survivor)
            _prove_between(state, survivor_at, step_s, 4e-3)
            seed += 1
            _polish(state, survivor, step_s, seed)
            if state.best_s > before_s * (1 - 1e-5):
                _prove_between(state, survivor_at, step_s, 1e-3)
                break
    while not state.done():
        before = seed
        for replicas in state.best_plans(3):
            seed += 1
            _polish(state, replicas, max(state.bound_s, state.best_s * (1 - 0.005)), seed)
        if seed == before or seed > MOST_POLISHES:
            return


def _prove_between(
    state: _State,
    survivor_at: Callable[[float], np.ndarray | None],
    upper_s: float,
    tolerance: float,
) -> None:
    """Raise the bound by bisection between itself and a T at which a plan survives."""
    low, high = state.bound_s, upper_s
    while high - low > tolerance * high and not state.done():
        middle = 0.5 * (low + high)
        if survivor_at(middle) is None:
            low = middle
            state.prove(middle)
        else:
            high = middle


def _survivor_of_list(state: _State, open_plans: OpenPlans, step_s: float) -> np.ndarray | None:
    """Return a listed plan that column generation does not exclude at T; None if there is none.

    Zeros if time runs out before either.
    """
    problem = state.problem
    here = open_plans.at(step_s, state.clock)
    reach = np.stack([amounts(table, step_s) for table in problem.tables])
    while len(here.plans):
        if state.clock.left_s <= 0:
            return np.zeros(len(problem.candidates), dtype=np.int64)
        replicas = here.plans[0].astype(np.int64)
        cut = _cut(state, replicas, reach, step_s)
        if cut is None:
            return replicas
        here.plans, here.theta = here.plans[1:], here.theta[1:]
        here.exclude(cut.values, cut.needed)
    return None


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
        if replicas is None or not replicas.any():
            return replicas
        cut = _cut(state, replicas, reach, step_s)
        if cut is None:
            return replicas
        cuts.append(cut)
    return np.zeros(len(problem.candidates), dtype=np.int64)


def _cut(state: _State, replicas: np.ndarray, reach: np.ndarray, step_s: float) -> Cut | None:
    """Return a cut that excludes a plan at T, by its columns; None if they do not."""
    problem = state.problem
    layouts = np.flatnonzero(replicas).tolist()
    found = generate(
        [problem.tables[i] for i in layouts],
        Budget.of_plan(replicas[layouts]),
        problem.counts,
        step_s,
        rounding="down",
        ticks=PROOF_TICKS,
        clock=state.clock,
        columns=state.pool.columns(layouts, step_s),
        stop_at_proof=True,
    )
    state.pool.keep(layouts, found)
    if not np.isfinite(found.bound):  # a bucket fits no layout of the plan in time
        fits = (reach[layouts] > 0).any(axis=0) | (problem.counts == 0)
        bucket = int(np.argmin(fits))
        return Cut(np.where(reach[:, bucket] > 0, 1.0, 0.0), 1.0)
    if found.bound <= 1 + 2 * CUT_SLACK:
        return None
    values = (found.prices[None, :] * reach).max(axis=1)
    values[layouts] = np.minimum(values[layouts], found.values)
    return Cut(values, float(found.prices @ problem.counts))


def _polish(
    state: _State, replicas: np.ndarray, step_s: float, seed: int, roundings: int = ROUNDINGS
) -> None:
    """Look for a better dispatch of a plan: columns at T, rounded; T grows until they suffice."""
    if state.times.get(tuple(replicas.tolist())) == np.inf:
        return  # it cannot be placed
    _shake(state, replicas, seed)
    problem = state.problem
    layouts = np.flatnonzero(replicas).tolist()
    tables = [problem.tables[i] for i in layouts]
    budget = Budget.of_plan(replicas[layouts])
    # whole replicas need some room: about a fifth of one
    room = min(MOST_ROOM, 0.2 / int(replicas.sum()))
    rounded = raises = 0
    while rounded < roundings and step_s < state.best_s and not state.done():
        found = generate(
            tables,
            budget,
            problem.counts,
            step_s,
            rounding="up",
            ticks=ROUNDING_TICKS,
            clock=state.clock,
            columns=state.pool.columns(layouts, step_s),
        )
        state.pool.keep(layouts, found)
        # theta may stay at 1 however long the step, where one layout is just enough in number
        enough = found.theta <= 1.0 + 2e-4
        if not enough or (found.theta > 1.0 - 0.8 * room and raises < 2):
            raises += enough
            step_s *= 1.0 + max(2e-4, 0.6 * (found.theta - 1.0 + room))
            continue
        diversify(found, tables, problem.counts, step_s, ROUNDING_TICKS, seed, state.clock)
        chosen = choose(found.columns, budget, problem.counts, found.prices, state.clock)
        rounded += 1
        if chosen:
            owned = [(layouts[owner], pattern) for owner, pattern in chosen]
            full = _with_idle(problem, owned, replicas)
            rounds = max(200, 2 * len(full))
            real = realise(problem.tables, problem.counts, full, state.target_s, rounds)
            state.note(replicas, real.step_time_s)
        step_s = step_s * 1.002


def _shake(state: _State, replicas: np.ndarray, seed: int) -> None:
    """Look for a better dispatch of a plan from the dispatcher's, by random disturbances."""
    problem = state.problem
    layouts = np.flatnonzero(replicas)
    tables = [problem.tables[i] for i in layouts]
    start = start_loads(tables, replicas[layouts], problem.counts)
    search_loads(start.loads, start.bound_s)
    rng, clock = np.random.default_rng(seed), state.clock.part(SHAKING)
    while clock.left_s > 0 and not state.done():
        shake(start.loads, state.target_s, SHAKE_TICKS, SHAKES, rng)
        state.note(replicas, max(chunks_of(start.loads, start.tables)[1]))


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


def _replicas_of(problem: Problem, plan: Plan) -> np.ndarray:
    groups = {group.layout: group.replicas for group in plan.groups}
    return np.array([groups.get(c.layout, 0) for c in problem.candidates], dtype=np.int64)
