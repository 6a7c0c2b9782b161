"""The interface of the planners: a problem in, a plan with what is known about it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lobra.layout.placement import is_placeable
from lobra.layout.plan import Plan, ReplicaGroup, make_plan
from lobra.planner.candidates import Candidate
from lobra.planner.chunks import ChunkTable, chunk_table
from lobra.planner.dispatch import CountAssignment, dispatch_counts
from lobra.profiler.cost_model import CostModel

Progress = Callable[[str], None]


def silent(message: str) -> None:
    """Take a progress message and show nothing."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What to plan for.

    Attributes
    ----------
    counts, buckets
        int64 [R]: the expected batch, sequences per bucket and the buckets' padded lengths.
    candidates
        The layouts that may be deployed.
    num_gpus, gpus_per_node
        What there is to deploy on.
    cost_model
        What it costs.
    """

    counts: np.ndarray
    buckets: np.ndarray
    candidates: tuple[Candidate, ...]
    num_gpus: int
    cost_model: CostModel
    gpus_per_node: int = 8

    @cached_property
    def tables(self) -> tuple[ChunkTable, ...]:
        """The chunk times of every candidate."""
        return tuple(
            chunk_table(c.layout, c.max_tokens, self.buckets, self.cost_model, self.counts)
            for c in self.candidates
        )

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [candidates]: GPUs of one replica of each."""
        return np.array([c.layout.num_gpus for c in self.candidates])

    def plan(self, replicas: np.ndarray) -> Plan:
        """Return the plan with so many replicas of each candidate."""
        return make_plan(
            [
                ReplicaGroup(candidate.layout, int(number), candidate.max_tokens)
                for candidate, number in zip(self.candidates, replicas, strict=True)
                if number > 0
            ]
        )

    def evaluate(self, plan: Plan, thorough: bool = True) -> CountAssignment:
        """Return the best dispatch found of the expected batch over a plan."""
        return dispatch_counts(self.counts, self.buckets, plan, self.cost_model, thorough=thorough)

    def can_place(self, plan: Plan) -> bool:
        """Return whether the plan fits the GPUs and the nodes."""
        return plan.num_gpus <= self.num_gpus and is_placeable(plan, self.gpus_per_node)


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
        Whether the planner's own search was completed.
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
