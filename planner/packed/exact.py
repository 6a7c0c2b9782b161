"""EXACT for packed steps: the plan best on average over sampled steps, and a certificate.

The certificate's integer program names the plan that may be best; its prices make the certificate
exact for it, and the program names the next, until it names one again. These, the best homogeneous
plans, and plans near the best are dispatched over a few steps, those with the lowest bounds first;
then the best over all steps. Prices of the steps where the bound is loosest end the certificate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lobra.common.errors import ConfigError
from lobra.layout.plan import Plan
from lobra.planner.certificate import LEAST_S, Certificate
from lobra.planner.clock import Clock
from lobra.planner.outcome import Progress, silent
from lobra.planner.packed.problem import PackedProblem
from lobra.planner.packed.step_times import StepTimes, step_times

FEW_STEPS, FEW_SEQUENCES = 12, 4000  # that every plan is tried on: at least two steps
MOST_HOMOGENEOUS, MOST_NAMED = 8, 4  # that are tried, those with the lowest bounds
TARGET_GAP = 1e-3
NAMED, NEAR, FULLY = 0.45, 0.6, 0.8  # of the time, after which the parts of the search end
SURE = 3  # moves from the first plan to one with a lower bound, however late it is
NAMING = 0.15  # of the time, for each plan that is named before the search
CERTIFYING = 0.15  # of the time, for the certificate of the best plan's loosest steps
PROMISING = 0.003  # a plan is dispatched over all steps if its estimate is within it of the best
LOOSEST, LOOSE = 30, 0.985  # steps of the best plan of which prices are computed in the end
SIMILAR = 0.005  # plans with farther bounds are tried while there is time for two over all steps
COMPARED = 0.03  # so is the best homogeneous one
MOST_FULLY = 3


def default_limit_s(num_gpus: int) -> float:
    """Return the seconds the search takes at most when no limit is given."""
    if num_gpus <= 64:
        return 4.5
    return 12.0 if num_gpus <= 256 else 35.0


@dataclass(frozen=True, eq=False)
class Found:
    """The best plans found over sampled steps, and what no plan takes less than.

    Attributes
    ----------
    step_s
        By plan, the best on average first: float64 [steps] seconds, synchronisation included.
    homogeneous, homogeneous_s
        The best plan of one layout, and its mean step; estimated, if it is not one of them, since
        it takes much longer.
    lower_bound_s
        No plan's mean step is shorter.
    seconds
        What the search took.
    complete
        Whether nothing was left out for want of time.
    """

    step_s: dict[Plan, np.ndarray]
    homogeneous: Plan
    homogeneous_s: float
    lower_bound_s: float
    seconds: float
    complete: bool


def solve(problem: PackedProblem, clock: Clock | None = None, progress: Progress = silent) -> Found:
    """Return the best plans found and the certificate.

    Without a clock the time is limited by the number of GPUs. A homogeneous plan and a bound are
    there however short it is.

    Raises
    ------
    ConfigError
        If no replica that holds the longest sequence can be placed.
    """
    fleet = problem.fleet
    same = list(fleet.homogeneous(problem.longest))
    if not same:
        raise ConfigError(
            f"no layout that holds {problem.longest} tokens can be placed on {fleet.num_gpus} GPUs "
            f"in nodes of {fleet.gpus_per_node}"
        )
    clock = clock or Clock(default_limit_s(fleet.num_gpus), processor=True)
    with step_times(problem, clock) as step_s:
        return _searched(_Search(problem, clock, progress, step_s), same)


def _searched(search: _Search, same: Sequence[np.ndarray]) -> Found:
    """Return what the search finds; ``same`` are the homogeneous plans."""
    problem = search.problem
    bounds_s = np.array([problem.homogeneous_bound_s(replicas) for replicas in same])
    homogeneous = search.try_best(same, bounds_s, MOST_HOMOGENEOUS)
    search.certificate.look_at(np.array(homogeneous))
    search.try_plan(search.lowest_bound())
    if named := search.named(NAMED):
        bounds_s = search.certificate.steps_s(np.array(named)).mean(axis=1)
        search.try_best(named, bounds_s, MOST_NAMED)
    search.climb(NEAR)
    search.run_fully(homogeneous)
    return search.found(homogeneous)


Key = tuple[int, ...]


@dataclass(eq=False)
class _Search:
    """What is known of plans; each is known by its replicas."""

    problem: PackedProblem
    clock: Clock
    progress: Progress
    step_s: StepTimes
    certificate: Certificate = field(init=False)
    few: np.ndarray = field(init=False)  # int64: the steps that every plan is tried on
    few_s: dict[Key, np.ndarray] = field(default_factory=dict)  # by plan: what these take
    all_s: dict[Key, np.ndarray] = field(default_factory=dict)  # and all steps
    lower_bound_s: float = 0.0
    every_step_s: float = 0.0  # that dispatching all steps takes, by the plan dispatched last
    is_cut: bool = False  # whether something was left out for want of time

    def __post_init__(self) -> None:
        problem = self.problem
        self.certificate = Certificate(
            problem.fleet, problem.longest, problem.counts, problem.rates
        )
        tokens = np.array([step.sum() for step in problem.steps])
        every = np.argsort(tokens, kind="stable")
        number = min(max(FEW_SEQUENCES // len(problem.steps[0]), 2), FEW_STEPS)
        places = np.linspace(0, len(every) - 1, min(number, len(every)))
        self.few = every[np.rint(places).astype(np.int64)]

    def is_out(self, share: float) -> bool:
        """Return whether a share of the time is over, for which something is then left out."""
        return self._cut_if(self.left_s(share) <= 0.0)

    def left_s(self, share: float) -> float:
        """Return the seconds until a share of the time is over; infinite without a limit."""
        limit_s = self.clock.limit_s
        return np.inf if limit_s is None else self.clock.left_s - (1.0 - share) * limit_s

    def is_time_for_all_steps(self, plans: int = 1) -> bool:
        """Return whether what is left is needed, or too little, for all steps and what follows.

        Of so many plans.

        Something else is then left out.
        """
        limit_s = self.clock.limit_s
        certify_s = 0.0 if limit_s is None else CERTIFYING * limit_s
        return self._cut_if(self.clock.left_s <= plans * self.every_step_s + certify_s)

    def _cut_if(self, is_late: bool) -> bool:
        self.is_cut |= is_late
        return is_late

    def try_plan(self, replicas: np.ndarray) -> Key | None:
        """Dispatch a few steps over a plan, or what of it can be placed; return its key."""
        placed = self.problem.fleet.placed(replicas, self.problem.longest)
        if placed is None:
            return None
        key = tuple(placed.tolist())
        if key not in self.few_s:
            plan = self.problem.fleet.plan(placed)
            self.few_s[key] = self.dispatched_s(plan, self.few.tolist())
            self.progress(f"{plan}: {self.few_s[key].mean():.4g} s on {len(self.few)} steps")
        return key

    def dispatched_s(self, plan: Plan, steps: Sequence[int]) -> np.ndarray:
        """Return what some of the steps take on a plan, and note how long that takes for all."""
        left_s = self.clock.left_s
        step_s = self.step_s(plan, steps)
        if self.clock.limit_s is not None:
            each_s = (left_s - self.clock.left_s) / len(steps)
            self.every_step_s = len(self.problem.steps) * each_s
        return step_s

    def estimates(self) -> dict[Key, float]:
        """Return, by plan, the mean of the few steps and what the bounds of the others differ."""
        if not self.few_s:
            return {}
        bounds_s = self.certificate.steps_s(np.array(list(self.few_s)))
        differ_s = bounds_s.mean(axis=1) - bounds_s[:, self.few].mean(axis=1)
        return {
            key: float(self.few_s[key].mean() + differ)
            for key, differ in zip(self.few_s, differ_s.tolist(), strict=True)
        }

    def best(self) -> Key:
        """Return the best plan by all steps, else by estimate."""
        if self.all_s:
            return min(self.all_s, key=lambda key: (self.all_s[key].mean(), key))
        estimates = self.estimates()
        return min(estimates, key=lambda key: (estimates[key], key))

    def try_best(self, plans: Sequence[np.ndarray], bounds_s: np.ndarray, most: int) -> Key:
        """Try the plans with the lowest bounds, at most so many; return the best plan known.

        However late it is, the first of them is tried: one dispatch may save half of a step.
        """
        for number, place in enumerate(np.argsort(bounds_s, kind="stable")[:most].tolist()):
            best_s = min(self.estimates().values(), default=np.inf)
            if bounds_s[place] < best_s and not (number and self.is_out(NEAR)):
                self.try_plan(plans[place])
        return self.best()

    def named(self, share: float) -> list[np.ndarray]:
        """Return the plans that the certificate's program names, until it names one again."""
        found: dict[Key, np.ndarray] = {}
        while not found or not self.is_out(share):
            limit_s = self.left_s(share)
            if share < 1.0 and self.clock.limit_s is not None:  # any will do to begin with
                limit_s = min(limit_s, NAMING * self.clock.limit_s)
            bound_s, replicas = self.certificate.minimum(max(limit_s, LEAST_S))
            self.lower_bound_s = max(self.lower_bound_s, bound_s)
            if replicas is None or (key := tuple(replicas.tolist())) in found:
                break
            found[key] = self.problem.fleet.filled(replicas)
            self.certificate.look_at(replicas)
        return list(found.values())

    def near(self, replicas: np.ndarray) -> list[np.ndarray]:
        """Return plans near one that hold the longest sequence."""
        fleet = self.problem.fleet
        filled = [fleet.filled(each) for each in fleet.neighbours(replicas)]
        return [one for one in filled if (fleet.max_tokens[one > 0] >= self.problem.longest).any()]

    def lowest_bound(self) -> np.ndarray:
        """Return a plan with a low bound, near the best one of replicas that could be divided."""
        fleet = self.problem.fleet
        best = fleet.rounded(self.certificate.shares * fleet.num_gpus, self.problem.longest)
        moves = 0
        while (moves < SURE or not self.is_out(NEAR)) and (near := self.near(best)):
            moves += 1
            self.certificate.look_at(best)
            bounds_s = self.certificate.steps_s(np.array([best, *near])).mean(axis=1)
            if bounds_s.min() >= bounds_s[0] * (1 - TARGET_GAP):
                break
            best = near[int(bounds_s.argmin()) - 1]
        return best

    def climb(self, share: float) -> None:
        """Go to better neighbours of the best plan while there are any."""
        centre = None
        while centre != (centre := self.best()) and not self.is_out(share):
            self.certificate.look_at(np.array(centre))
            best_s = self.estimates()[centre]
            if not (near := self.near(np.array(centre))):
                return
            bounds_s = self.certificate.steps_s(np.array([centre, *near])).mean(axis=1)
            similar_s, bounds_s = bounds_s[0] * (1 + SIMILAR), bounds_s[1:]
            for place in np.argsort(bounds_s, kind="stable").tolist():
                if bounds_s[place] >= best_s * (1 - TARGET_GAP) or self.is_out(share):
                    break
                if bounds_s[place] >= similar_s and self.is_time_for_all_steps(plans=2):
                    break
                if self.left_s(NAMED) <= 0.0 and self.is_time_for_all_steps():
                    return
                key = self.try_plan(near[place])
                if key is not None and self.estimates()[key] < best_s * (1 - TARGET_GAP):
                    break

    def run_fully(self, homogeneous: Key) -> None:
        """Dispatch all steps over the best plans, and refer the certificate to the best."""
        estimates = self.estimates()
        order = sorted(estimates, key=lambda key: (estimates[key], key))
        within_s = estimates[order[0]] * (1 + PROMISING)
        good = [key for key in order if estimates[key] <= within_s][:MOST_FULLY]
        near = estimates[homogeneous] <= estimates[order[0]] * (1 + COMPARED)
        needed = [good[0], homogeneous] if near else good[:1]
        every = range(len(self.problem.steps))
        for key in dict.fromkeys([*needed, *good]):
            if key not in needed and (self.is_out(FULLY) or self.is_time_for_all_steps()):
                break
            self.all_s[key] = self.dispatched_s(self.problem.fleet.plan(np.array(key)), every)
        self.certify()

    def certify(self) -> None:
        """Raise the bound by the prices of the best plan's loosest steps."""
        best = np.array(self.best())
        step_s = self.all_s[self.best()]
        ratio = self.certificate.steps_s(best[None])[0] / step_s
        loose = np.argsort(ratio, kind="stable")[:LOOSEST]
        self.certificate.look_at(best, [step for step in loose.tolist() if ratio[step] < LOOSE])
        self.named(1.0)

    def found(self, homogeneous: Key) -> Found:
        """Return what was found."""
        fleet = self.problem.fleet
        same_s = self.all_s.get(homogeneous)
        order = sorted(self.all_s, key=lambda key: (self.all_s[key].mean(), key))
        return Found(
            {fleet.plan(np.array(key)): self.all_s[key] for key in order},
            fleet.plan(np.array(homogeneous)),
            self.estimates()[homogeneous] if same_s is None else float(same_s.mean()),
            min(self.lower_bound_s, float(self.all_s[order[0]].mean())),
            self.clock.elapsed_s,
            not self.is_cut and self.clock.left_s > 0,
        )
