"""What a plan is compared with: LobRA's baselines, and the plan itself under simpler dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lobra.common.errors import ConfigError
from lobra.layout.plan import Plan
from lobra.layout.sequences import Batching
from lobra.planner.bucketed import homogeneous
from lobra.planner.bucketed.dispatch import Mode
from lobra.planner.bucketed.expected_batch import expect
from lobra.planner.bucketed.problem import Problem
from lobra.planner.candidates import Candidate
from lobra.planner.simulate import Simulation, simulate, simulate_packed
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel

FUSED_BUCKETS = 7  # LobRA's baselines pad to its set of seven


def baselines(
    workload: Workload,
    candidates: Sequence[Candidate],
    cost_model: CostModel,
    num_gpus: int,
    num_steps: int,
    *,
    gpus_per_node: int = 8,
) -> tuple[list[Simulation], list[str]]:
    """Return Task-Sequential and Task-Fused: homogeneous plans, LobRA's seven fixed buckets.

    Task-Sequential runs one task after another, each on the homogeneous plan best for it; its step
    is the sum of theirs. Without both, and with the reason, if the sequences are longer than the
    fixed buckets, or no homogeneous plan holds them.
    """
    try:
        fused = _homogeneous(workload, candidates, cost_model, num_gpus, gpus_per_node)
        if fused is None:
            raise ConfigError(f"no homogeneous plan of {num_gpus} GPUs holds all tasks")
        alone = []
        elements = cost_model.adapter_elements / len(workload.lengths)
        alone_model = replace(cost_model, adapter_elements=elements)  # one of like adapters
        for task in workload.lengths:
            one = workload.only(task)
            plan = _homogeneous(one, candidates, cost_model, num_gpus, gpus_per_node)
            if plan is None:
                raise ConfigError(f"no homogeneous plan of {num_gpus} GPUs holds task {task}")
            alone.append(_fixed(plan, one, alone_model, num_steps, task))
    except ConfigError as error:
        return [], [f"Task-Sequential and Task-Fused: {error}"]
    # the share of all GPUs' time that is used, task by task
    busy = _added([run.busy_s @ run._gpus_of_replicas() / run.num_gpus for run in alone])
    sequential = Simulation(
        "Task-Sequential, 7 fixed buckets",
        None,
        num_gpus,
        _added([run.step_time_s for run in alone]),
        busy[:, None],
        _added([run.tokens for run in alone]),
        _added([run.padded_tokens for run in alone]),
        _added([run.dispatch_time_s for run in alone]),
    )
    name = "Task-Fused, 7 fixed buckets"
    return [sequential, _fixed(fused, workload, cost_model, num_steps, name)], []


def ladder(
    plan: Plan,
    workload: Workload,
    cost_model: CostModel,
    num_steps: int,
    *,
    num_buckets: int = 16,
    batching: Batching = "bucketed",
) -> tuple[list[Simulation], list[str]]:
    """Return the plan under ever better dispatch, the one it is meant for last.

    By length, balanced, dynamic buckets, and greedy (LPT); then packed, if it is for that. A rung
    whose buckets the plan cannot take is left out; the second list says why.
    """
    rungs: list[tuple[str, bool, Mode | None, int]] = [
        ("length-based, 16 fixed buckets", True, "group", 16),
        ("balanced, 16 fixed buckets", True, "balance", 16),
        ("greedy LPT, dynamic buckets", False, None, num_buckets),
        ("balanced, dynamic buckets", False, "balance", num_buckets),
    ]
    runs, left_out = [], []
    for name, static, mode, number in rungs:
        try:
            runs.append(
                simulate(
                    plan,
                    workload,
                    cost_model,
                    num_steps,
                    name=name,
                    num_buckets=number,
                    static=static,
                    mode=mode,
                )
            )
        except ConfigError as error:
            if not static and batching == "bucketed":  # a step may not be longer than a replica
                raise
            left_out.append(f"{name}: {error}")
    if batching == "packed":
        runs.append(simulate_packed(plan, workload, cost_model, num_steps))
    return runs, left_out


def _added(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum per step; a task that has ended adds nothing."""
    total = np.zeros(max(map(len, values)), dtype=values[0].dtype)
    for own in values:
        total[: len(own)] += own
    return total


def _fixed(
    plan: Plan, workload: Workload, cost_model: CostModel, num_steps: int, name: str
) -> Simulation:
    return simulate(
        plan,
        workload,
        cost_model,
        num_steps,
        name=name,
        num_buckets=FUSED_BUCKETS,
        static=True,
    )


def _homogeneous(
    workload: Workload,
    candidates: Sequence[Candidate],
    cost_model: CostModel,
    num_gpus: int,
    gpus_per_node: int,
) -> Plan | None:
    batch = expect(workload, FUSED_BUCKETS, static=True)
    problem = Problem(
        batch.counts, batch.buckets, tuple(candidates), num_gpus, cost_model, gpus_per_node
    )
    found = homogeneous.find(problem)
    return None if found is None else found.plan
