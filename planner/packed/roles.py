"""A packed plan explained: what each layout does in sampled steps, and why it is there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lobra.layout.plan import Plan
from lobra.planner.packed.problem import PackedProblem
from lobra.planner.roles import Role, explained


def roles(problem: PackedProblem, plan: Plan, steps: Sequence[int]) -> tuple[list[Role], float]:
    """Return every group's role in some of the steps, and the share of tokens that are padding."""
    lengths = problem.lengths
    taken = np.zeros((len(plan.groups), len(lengths)), dtype=np.int64)
    of_replica = np.repeat(np.arange(len(plan.groups)), [g.replicas for g in plan.groups])
    computed = 0
    for step, assignment in zip(steps, problem.dispatch(plan, steps), strict=True):
        computed += assignment.padded_tokens
        for replica, batches in enumerate(assignment.micro_batches):
            for batch in batches:
                places = np.searchsorted(lengths, problem.steps[step][batch.indices])
                np.add.at(taken[of_replica[replica]], places, 1)
    by_layout = {
        (candidate.layout, candidate.max_tokens): rates.least_s
        for candidate, rates in zip(problem.fleet.candidates, problem.rates, strict=True)
    }
    rate_s = np.stack([by_layout[group.layout, group.max_tokens] for group in plan.groups])
    padding = 1.0 - float((taken * lengths).sum()) / computed
    return explained(plan.groups, lengths, taken, rate_s), padding
