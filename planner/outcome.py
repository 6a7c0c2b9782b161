"""What a planner returns: a plan with what is known about it, and words of progress before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from lobra.layout.plan import Plan

SAME = 5e-4  # relative: what differs by less is called the same
SIMPLER = 0.01  # relative: by how much a mixture of layouts must be faster to be worth it
Progress = Callable[[str], None]


def silent(message: str) -> None:
    """Take a progress message and show nothing."""


@dataclass(frozen=True)
class Outcome:
    """A plan and what is known about it.

    Attributes
    ----------
    plan
        The plan.
    step_time_s
        The exact evaluator's time of a dispatch of the expected batch over it.
    lower_bound_s
        No plan on these candidates and GPUs is faster; 0 where the planner proves nothing.
    planner
        The pattern's name.
    planner_time_s
        Wall-clock seconds it took.
    objective_s
        The planner's own objective, where it has one of its own (LobRA's methods).
    proven
        Whether the planner proved that no plan is better by its own objective.
    complete
        Whether nothing was left out for want of time.
    notes
        What a person should know, one sentence each.
    alternatives
        Plans nearly as good, the best first, each with its step time.
    """

    plan: Plan
    step_time_s: float
    lower_bound_s: float
    planner: str
    planner_time_s: float
    objective_s: float | None = None
    proven: bool = False
    complete: bool = True
    notes: tuple[str, ...] = field(default=())
    alternatives: tuple[tuple[Plan, float], ...] = field(default=())

    @property
    def gap(self) -> float:
        """How much faster a plan might at most be, relative to this one's step time."""
        return max(0.0, 1.0 - self.lower_bound_s / self.step_time_s)

    @property
    def gpu_seconds(self) -> float:
        """Step time times the GPUs deployed."""
        return self.step_time_s * self.plan.num_gpus

    def noted(self, *notes: str | None) -> Outcome:
        """Return the outcome with further notes, those that there are."""
        return replace(self, notes=(*self.notes, *filter(None, notes)))


@dataclass(frozen=True)
class SampledMean:
    """What a plan takes on average over sampled steps, and what no plan takes less than.

    Attributes
    ----------
    steps
        How many were sampled.
    mean_step_time_s
        The plan's mean, the adapters' synchronisation included.
    mean_gpu_seconds
        That times the GPUs deployed.
    lower_bound_s
        The mean of no plan on these candidates and GPUs is less.
    """

    steps: int
    mean_step_time_s: float
    mean_gpu_seconds: float
    lower_bound_s: float

    @property
    def gap(self) -> float:
        """How much faster another plan might at most be, relative to this one."""
        return max(0.0, 1.0 - self.lower_bound_s / self.mean_step_time_s)

    def as_json(self) -> dict[str, float]:
        """Return what `lobra plan --json` says of it."""
        return {**asdict(self), "gap": self.gap}


def compared(outcome: Outcome, same: Outcome) -> str:
    """Return the best homogeneous plan in words, and what the plan saves against it."""
    share = outcome.gpu_seconds / same.gpu_seconds - 1.0
    if abs(share) < SAME:
        verdict = "the same"
    else:
        verdict = f"this plan takes {100 * abs(share):.1f} % {'more' if share > 0 else 'less'}"
    return (
        f"{same.plan} on {same.plan.num_gpus} GPUs: {same.step_time_s:.4g} s, "
        f"{same.gpu_seconds:.4g} GPU-seconds ({verdict})"
    )
