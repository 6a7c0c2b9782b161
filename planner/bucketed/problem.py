"""What to plan for: the expected batch, the candidates, the GPUs and the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lobra.layout.plan import Plan
from lobra.planner.bucketed.dispatch import CountAssignment, dispatch_counts
from lobra.planner.bucketed.time_table import TimeTable, time_table
from lobra.planner.candidates import Candidate
from lobra.planner.fleet import Fleet
from lobra.profiler.cost_model import CostModel


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
    def tables(self) -> tuple[TimeTable, ...]:
        """The micro-batch times of every candidate."""
        return tuple(
            time_table(c.layout, c.max_tokens, self.buckets, self.cost_model, self.counts)
            for c in self.candidates
        )

    @cached_property
    def fleet(self) -> Fleet:
        """What there is to deploy, and on what."""
        return Fleet(self.candidates, self.num_gpus, self.gpus_per_node)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [candidates]: GPUs of one replica of each."""
        return self.fleet.sizes

    @property
    def longest(self) -> int:
        """Tokens of the longest bucket of the batch."""
        return int(self.buckets[self.counts > 0].max())

    def plan(self, replicas: np.ndarray) -> Plan:
        """Return the plan with so many replicas of each candidate."""
        return self.fleet.plan(replicas)

    def evaluate(self, plan: Plan, thorough: bool = True) -> CountAssignment:
        """Return the best dispatch found of the expected batch over a plan."""
        return dispatch_counts(self.counts, self.buckets, plan, self.cost_model, thorough=thorough)
