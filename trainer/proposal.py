"""A plan for the steps that a run has left, found in a process of its own, beside the present one.

Both plans are priced on the same steps, those that the run will train. Nothing here needs torch:
the process starts in a second and works while the run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np

from lobra.common.errors import ConfigError
from lobra.layout.plan import Plan
from lobra.layout.shapes import ModelShape, layout_problem
from lobra.planner.deployment import Options, plan_with_meta
from lobra.planner.packed.dispatch import dispatch_packed, packed_costs
from lobra.planner.step_time import sync_time_s
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel
from lobra.profiler.profiles import MemoryProfile

PRICED_STEPS = 48  # at most, evenly spaced over what is left
NICENESS = 10  # of the process: ranks may need all cores


@dataclass(frozen=True, eq=False)
class PlanningJob:
    """What is planned for.

    Attributes
    ----------
    plan
        The present plan.
    workload
        The tasks, from the next step on.
    num_steps
        The steps that are left.
    memory, cost_model, shape
        What fits beside the tasks' adapters, what steps take, and the model's sizes.
    model
        What the plan's file calls it.
    num_gpus, gpus_per_node
        What there is to plan for.
    most_tp
        The most GPUs of a tensor-parallel group; None: any number.
    """

    plan: Plan
    workload: Workload
    num_steps: int
    memory: MemoryProfile
    cost_model: CostModel
    shape: ModelShape
    model: str
    num_gpus: int
    gpus_per_node: int
    most_tp: int | None = None

    def refusal(self, tp: int, pp: int) -> str | None:
        """Return why there can be no replica of a layout, None if there can."""
        if self.most_tp is not None and tp > self.most_tp:
            return f"tp {tp} is more than a host has GPUs"
        return layout_problem(self.shape, tp, pp)


@dataclass(frozen=True)
class Proposal:
    """A plan beside the present one.

    Attributes
    ----------
    plan
        The plan.
    present_s, proposed_s
        What steps that are evenly spaced over those that are left take on the present plan and on
        this one, predicted.
    num_steps
        How many are left.
    """

    plan: Plan
    present_s: tuple[float, ...]
    proposed_s: tuple[float, ...]
    num_steps: int


def propose(job: PlanningJob) -> Proposal:
    """Return the best plan found; ConfigError if there is none."""
    from lobra.planner.deploy import deploy  # with its solvers: only who plans loads them

    found = deploy(
        job.workload,
        job.memory,
        job.cost_model,
        job.num_gpus,
        Options(batching="packed", gpus_per_node=job.gpus_per_node),
        refused=job.refusal,
    )
    plan = plan_with_meta(found, job.model, job.memory, job.gpus_per_node)
    every = np.linspace(0, job.num_steps - 1, min(job.num_steps, PRICED_STEPS)).astype(int)
    steps = [lengths for step in every.tolist() for lengths in job.workload.steps(1, step)]
    present_s, proposed_s = (step_times_s(each, steps, job.cost_model) for each in (job.plan, plan))
    return Proposal(plan, present_s, proposed_s, job.num_steps)


def step_times_s(
    plan: Plan, steps: Sequence[np.ndarray], cost_model: CostModel
) -> tuple[float, ...]:
    """Return what steps, given by their sequences' lengths, take on a plan."""
    costs, sync_s = packed_costs(plan, cost_model), sync_time_s(plan, cost_model)
    return tuple(dispatch_packed(one, plan, costs).step_time_s + sync_s for one in steps)


class PlanningProcess:
    """Plans in a process of its own, which ends with this one."""

    def __init__(self, plan: Callable[[], Proposal]) -> None:
        """Start the process: what is called there can be pickled."""
        context = get_context("spawn")
        self._results, answers = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(plan, answers), daemon=True)
        self._process.start()
        answers.close()

    def result(self, wait_s: float | None = 0.0) -> Proposal | None:
        """Return the proposal, None if there is none yet after so long; None: wait for it.

        Raises
        ------
        ConfigError
            If there is no plan, or the process failed.
        """
        if not self._results.poll(wait_s):
            return None
        try:
            found = self._results.recv()
        except EOFError:
            found = ConfigError("the planning process died")
        if isinstance(found, ConfigError):
            raise found
        assert isinstance(found, Proposal)
        return found

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._results.close()


def _work(plan: Callable[[], Proposal], answers: Connection) -> None:
    os.nice(NICENESS)
    with suppress(BrokenPipeError):  # the run has ended meanwhile
        try:
            answers.send(plan())
        except ConfigError as error:
            answers.send(error)
