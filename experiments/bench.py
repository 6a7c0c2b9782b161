"""The bench of an experiment: one workload on one cluster under one cost model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from experiments.inputs import Costs
from experiments.published import parse_plan
from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.placement import is_placeable
from lobra.layout.plan import Plan, ReplicaGroup, make_plan
from lobra.planner.baselines import FUSED_BUCKETS
from lobra.planner.bucketed.buckets import bucket_index, static_buckets
from lobra.planner.bucketed.dispatch import dispatch_counts
from lobra.planner.bucketed.expected_batch import expect
from lobra.planner.bucketed.identical import replica_cost_s
from lobra.planner.bucketed.time_table import time_table
from lobra.planner.candidates import Candidate, all_candidates
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel
from lobra.profiler.profiles import layout_problem_of

GPUS_PER_NODE = 8
NUM_BUCKETS = 16
# The sampled steps that baselines' layouts are chosen by: others than those that are reported.
CHOICE_STEPS, CHOICE_FIRST = 50, 1000


@dataclass(frozen=True, eq=False)
class Bench:
    """Everything a cell needs."""

    model: str
    num_gpus: int
    workload: Workload
    costs: Costs
    num_steps: int

    def published_plan(self, text: str) -> Plan:
        """Return a published plan with the capacities of our memory profile.

        Raises
        ------
        ConfigError
            If the profile says that a layout of it does not fit.
        """
        groups = []
        for tp, pp, replicas in parse_plan(text):
            tokens = self.costs.memory.max_tokens(tp, pp)
            if tokens == 0:
                raise ConfigError(f"plan {text}: <{tp},{pp}> does not fit under this profile")
            groups.append(ReplicaGroup(Layout(tp, pp), replicas, tokens))
        return make_plan(groups)

    def holds(self, plan: Plan, workload: Workload) -> bool:
        """Return whether the plan holds the longest of LobRA's seven buckets that is needed."""
        return plan.max_tokens >= _longest_bucket(workload)

    def candidates(self) -> tuple[Candidate, ...]:
        """Return every layout that fits this cluster."""
        return all_candidates(
            self.costs.memory,
            self.costs.cost_model,
            self.num_gpus,
            self.workload.longest,
            GPUS_PER_NODE,
            self.refused,
        ).chosen

    def refused(self, tp: int, pp: int) -> str | None:
        """Say why the model cannot run on a layout, or return None."""
        return layout_problem_of(self.model, tp, pp)

    def task(self, name: str) -> Workload:
        """Return the workload of one task alone."""
        return self.workload.only(name)

    def best_homogeneous(self, workload: Workload) -> Plan:
        """Return the homogeneous plan fastest on average, its replicas dealt sequences evenly.

        Over LobRA's seven buckets and sampled steps other than those that are reported.

        Raises
        ------
        ConfigError
            If no layout holds the longest bucket.
        """
        buckets = static_buckets(FUSED_BUCKETS, workload.longest)
        steps = [
            np.bincount(bucket_index(lengths, buckets), minlength=len(buckets))
            for lengths in workload.steps(CHOICE_STEPS, CHOICE_FIRST)
        ]
        times = {
            plan: float(
                np.mean(
                    [dealt_time_s(s, buckets, plan, self.costs.cost_model).max() for s in steps]
                )
            )
            for plan in self._homogeneous(_longest_bucket(workload))
        }
        return self._fastest(times)

    def best_balanced(self, workload: Workload, dynamic: bool = False) -> Plan:
        """Return the homogeneous plan fastest for the expected batch under our dispatcher.

        Over LobRA's seven buckets, or as many dynamic ones as our plans have.

        Raises
        ------
        ConfigError
            If no layout holds the longest bucket.
        """
        number = NUM_BUCKETS if dynamic else FUSED_BUCKETS
        batch = expect(workload, number, static=not dynamic)
        longest = int(batch.buckets[-1]) if dynamic else _longest_bucket(workload)
        model = self.costs.cost_model
        times = {
            plan: dispatch_counts(batch.counts, batch.buckets, plan, model).step_time_s
            for plan in self._homogeneous(longest)
        }
        return self._fastest(times)

    def _fastest(self, times: Mapping[Plan, float]) -> Plan:
        if not times:
            raise ConfigError(f"{self.model}: no homogeneous plan on {self.num_gpus} GPUs")
        return min(times, key=times.__getitem__)

    def _homogeneous(self, longest: int) -> list[Plan]:
        plans = []
        for candidate in self.candidates():
            number = self.num_gpus // candidate.layout.num_gpus
            if candidate.max_tokens < longest or number == 0:
                continue
            plan = make_plan([ReplicaGroup(candidate.layout, number, candidate.max_tokens)])
            if is_placeable(plan, GPUS_PER_NODE):
                plans.append(plan)
        return plans

    def published_or_best(self, text: str, workload: Workload, best: Plan) -> tuple[Plan, bool]:
        """Return the published homogeneous plan; the best, and False, where it does not fit."""
        try:
            plan = self.published_plan(text)
        except ConfigError:
            return best, False
        if not self.holds(plan, workload):
            return best, False
        return plan, True

    def with_capacities(self, times: int) -> Bench:
        """Return the bench with so many times the capacities: activations take less memory."""
        memory = self.costs.memory
        rows = tuple(replace(row, max_tokens=times * row.max_tokens) for row in memory.rows)
        digest = f"{self.costs.digest}-x{times}"
        costs = replace(self.costs, memory=replace(memory, rows=rows), digest=digest)
        return replace(self, costs=costs) if times > 1 else self

    def in_powers_of_two(self) -> Bench:
        """Return the bench with capacities as LobRA measures them: rounded to powers of two."""
        memory = self.costs.memory
        rows = tuple(
            replace(row, max_tokens=1 << (row.max_tokens.bit_length() - 1) if row.max_tokens else 0)
            for row in memory.rows
        )
        if rows == memory.rows:
            return self
        costs = replace(
            self.costs,
            memory=replace(memory, rows=rows),
            digest=f"{self.costs.digest}-powers",
        )
        return replace(self, costs=costs)


def _longest_bucket(workload: Workload) -> int:
    return int(static_buckets(FUSED_BUCKETS, workload.longest)[-1])


def dealt_time_s(
    counts: np.ndarray, buckets: np.ndarray, plan: Plan, cost_model: CostModel
) -> np.ndarray:
    """Return float64 [replicas]: a homogeneous plan's times when sequences are dealt out evenly.

    The ``counts`` [R] sequences of every bucket are dealt one by one, beginning at the first
    replica, so that it gets ``ceil(count / replicas)`` of each: the step time LobRA reckons with
    for replicas of one layout.

    Raises
    ------
    ValueError
        If the plan has more than one layout.
    ConfigError
        If a bucket is longer than a replica holds.
    """
    if len(plan.groups) != 1:
        raise ValueError(f"plan {plan}: of more than one layout")
    (group,) = plan.groups
    table = time_table(group.layout, group.max_tokens, buckets, cost_model, counts)
    too_long = buckets[(table.limit == 0) & (counts > 0)]
    if len(too_long):
        raise ConfigError(f"a sequence of {too_long[0]} tokens fits no replica of {plan}")
    floor, extra = np.divmod(counts, group.replicas)
    shares = floor + (np.arange(group.replicas)[:, None] < extra)
    return np.array([replica_cost_s(table, own) for own in shares])
