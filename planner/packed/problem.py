"""What to plan packed steps for: the steps themselves, the fleet and the cost model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lobra.layout.plan import Plan
from lobra.layout.sequences import IntArray
from lobra.planner.assignment import Assignment
from lobra.planner.fleet import Fleet
from lobra.planner.packed.dispatch import dispatch_packed, packed_costs
from lobra.planner.packed.rates import Rates, rates_of
from lobra.planner.step_time import sync_time_s
from lobra.profiler.cost_model import CostModel


@dataclass(frozen=True, eq=False)
class PackedProblem:
    """What to plan for.

    Attributes
    ----------
    steps
        int64 [n] each: the lengths of every sampled step's sequences.
    longest
        The tokens that some replica must hold, in these steps or not.
    fleet
        What plans are made of.
    cost_model
        What it costs.
    """

    steps: tuple[IntArray, ...]
    longest: int
    fleet: Fleet
    cost_model: CostModel

    @property
    def num_gpus(self) -> int:
        """GPUs to plan for."""
        return self.fleet.num_gpus

    @cached_property
    def lengths(self) -> IntArray:
        """int64 [D]: the lengths that occur, ascending."""
        return np.unique(np.concatenate(self.steps))

    @cached_property
    def counts(self) -> IntArray:
        """int64 [steps, D]: how often they do."""
        places = [np.searchsorted(self.lengths, step) for step in self.steps]
        return np.stack([np.bincount(place, minlength=len(self.lengths)) for place in places])

    @cached_property
    def rates(self) -> tuple[Rates, ...]:
        """What sequences cost on every candidate at least."""
        every = self.counts.sum(axis=0).astype(np.float64)
        return tuple(
            rates_of(candidate, self.cost_model, self.lengths, every)
            for candidate in self.fleet.candidates
        )

    def homogeneous_bound_s(self, replicas: IntArray) -> float:
        """Return what the mean step over replicas of one candidate takes at least.

        ``replicas`` is int64 [candidates], and more than 0 for one that holds every sequence.
        """
        place = int(np.flatnonzero(replicas)[0])
        rates, number = self.rates[place], int(replicas[place])
        step_s = np.maximum(
            self.counts @ rates.least_s / number, self.longest_alone_s(rates.alone_s)
        )
        rate_s, bubble_s = rates.after(float(step_s.min()))
        return float(np.maximum(step_s, self.counts @ rate_s / number + bubble_s).mean())

    def longest_alone_s(self, alone_s: np.ndarray) -> np.ndarray:
        """Return float64 [steps]: what the sequence that takes longest in each takes alone.

        ``alone_s``, float64 [D], are the seconds of each length.
        """
        longest_s: np.ndarray = np.where(self.counts > 0, alone_s, 0.0).max(axis=1)
        return longest_s

    def dispatch(self, plan: Plan, steps: Iterable[int]) -> list[Assignment]:
        """Return the assignments of some of the steps, known by their places, over a plan."""
        costs = packed_costs(plan, self.cost_model)
        sync_s = sync_time_s(plan, self.cost_model)
        return [
            dispatch_packed(self.steps[step], plan, costs, sync_time_s=sync_s) for step in steps
        ]

    def step_s(self, plan: Plan, steps: Iterable[int]) -> np.ndarray:
        """Return float64 [steps]: what some of the steps take, synchronisation included."""
        found = self.dispatch(plan, steps)
        return np.array([each.step_time_s + each.sync_time_s for each in found])
