"""The simulator: steps of a plan under the cost model, without GPUs; baselines beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lobra.common.errors import ConfigError
from lobra.layout.plan import Plan
from lobra.planner.buckets import bucket_index, make_buckets, static_buckets
from lobra.planner.candidates import Candidate
from lobra.planner.chunks import chunk_table
from lobra.planner.dispatch import Assignment, Mode, dispatch
from lobra.planner.evaluate import sync_time_s
from lobra.planner.first import greedy
from lobra.planner.planners import homogeneous
from lobra.planner.planners.base import Problem
from lobra.planner.workload import Workload, expect
from lobra.profiler.cost_model import CostModel

FUSED_BUCKETS = 7  # LobRA's baselines pad to its set of seven


@dataclass(frozen=True, eq=False)
class Simulation:
    """What some steps of one plan took.

    Attributes
    ----------
    name
        What was simulated.
    plan
        The plan; None for Task-Sequential, which has one per task.
    num_gpus
        GPUs it occupies.
    step_time_s
        float64 [steps]: the slowest replica's time, and the adapters' synchronisation where it
        was profiled.
    busy_s
        float64 [steps, replicas]: each replica's time, bubbles included.
    tokens, padded_tokens
        int64 [steps]: tokens of the sequences, and tokens computed.
    dispatch_time_s
        float64 [steps]: wall-clock seconds the dispatcher took.
    """

    name: str
    plan: Plan | None
    num_gpus: int
    step_time_s: np.ndarray
    busy_s: np.ndarray
    tokens: np.ndarray
    padded_tokens: np.ndarray
    dispatch_time_s: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Return the figures a person compares, as plain numbers."""
        mean_s = float(self.step_time_s.mean())
        weights = np.ones(1) if self.plan is None else self._gpus_of_replicas()
        busy = float((self.busy_s @ weights).sum())
        whole = float(self.step_time_s.sum()) * float(weights.sum())
        return {
            "name": self.name,
            "plan": "one per task" if self.plan is None else str(self.plan),
            "num_gpus": self.num_gpus,
            "steps": len(self.step_time_s),
            "mean_s": mean_s,
            "p50_s": float(np.percentile(self.step_time_s, 50)),
            "p99_s": float(np.percentile(self.step_time_s, 99)),
            "gpu_seconds": mean_s * self.num_gpus,
            "idle": 1.0 - busy / whole,
            "padding": 1.0 - float(self.tokens.sum()) / float(self.padded_tokens.sum()),
            "dispatch_ms": 1000.0 * float(np.median(self.dispatch_time_s)),
        }

    def _gpus_of_replicas(self) -> np.ndarray:
        assert self.plan is not None
        return np.array([replica.layout.num_gpus for replica in self.plan.replicas], dtype=float)


def simulate(
    plan: Plan,
    workload: Workload,
    cost_model: CostModel,
    num_steps: int,
    *,
    name: str = "balanced, dynamic buckets",
    first_step: int = 0,
    num_buckets: int = 16,
    static: bool = False,
    mode: Mode | None = "balance",
) -> Simulation:
    """Return what ``num_steps`` steps of a plan take, from ``first_step`` on.

    They are steps of the run that `lobra train` makes of the workload: fewer if all its tasks end
    earlier (at least one must be left).

    ``mode`` None dispatches by greedy LPT (``lpt_times_s``) instead of the dispatcher. ``static``:
    the fixed set of ``num_buckets`` buckets instead of each step's own.
    """
    sync_s = sync_time_s(plan, cost_model)
    times, busy, tokens, padded, dispatch_s = [], [], [], [], []
    for lengths in workload.steps(num_steps, first_step):
        start = time.perf_counter()
        longest = workload.longest
        buckets = (
            static_buckets(num_buckets, longest) if static else make_buckets(lengths, num_buckets)
        )
        if mode is None:
            replica_s = lpt_times_s(lengths, buckets, plan, cost_model)
            padded.append(int(buckets[bucket_index(lengths, buckets)].sum()))
        else:
            assignment = dispatch(lengths, plan, cost_model, buckets=buckets, mode=mode)
            replica_s = assignment.replica_time_s
            padded.append(assignment.padded_tokens)
        dispatch_s.append(time.perf_counter() - start)
        times.append(float(replica_s.max()) + sync_s)
        busy.append(replica_s)
        tokens.append(int(lengths.sum()))
    return Simulation(
        name,
        plan,
        plan.num_gpus,
        np.array(times),
        np.stack(busy),
        np.array(tokens),
        np.array(padded),
        np.array(dispatch_s),
    )


def lpt_times_s(
    lengths: np.ndarray, buckets: np.ndarray, plan: Plan, cost_model: CostModel
) -> np.ndarray:
    """Return float64 [replicas]: times of greedy dispatch, the free baseline.

    Buckets from the longest; the next chunk, as large as the replica holds, goes where it ends
    first.
    """
    counts = np.bincount(bucket_index(lengths, buckets), minlength=len(buckets))
    tables = [
        chunk_table(group.layout, group.max_tokens, buckets, cost_model) for group in plan.groups
    ]
    for bucket in np.flatnonzero(counts).tolist():
        if not any(table.limit[bucket] for table in tables):
            raise ConfigError(f"a sequence of {buckets[bucket]} tokens fits no replica of {plan}")
    group = np.repeat(np.arange(len(tables)), [g.replicas for g in plan.groups])
    return greedy(tables, group, counts)[1]


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
) -> tuple[list[Simulation], list[str]]:
    """Return the plan under ever better dispatch: by length, balanced, dynamic buckets; and LPT.

    A rung whose fixed buckets the plan cannot take is left out; the second list says why.
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
            if not static:  # a fixed bucket may be longer than any replica holds; a step may not
                raise
            left_out.append(f"{name}: {error}")
    return runs, left_out


def chrome_trace(assignment: Assignment, plan: Plan, cost_model: CostModel) -> dict[str, Any]:
    """Return a step's timeline in Chrome's trace format: a process per replica, times in us."""
    events: list[dict[str, Any]] = []
    for replica, chunks in zip(plan.replicas, assignment.micro_batches, strict=True):
        layout, at_us = replica.layout, 0.0
        events.append(
            {
                "ph": "M",
                "name": "process_name",
                "pid": replica.index,
                "args": {"name": f"replica {replica.index} {layout}"},
            }
        )
        longest_us = 0.0
        for chunk in chunks:
            time_ms = cost_model.chunk_time_ms(
                layout.tp, layout.pp, chunk.num_sequences, chunk.padded_length, layout.memory
            )
            length_us = 1000.0 * float(time_ms)
            longest_us = max(longest_us, length_us)
            name = f"{chunk.num_sequences} x {chunk.padded_length}"
            events.append(_slice(name, replica.index, at_us, length_us))
            at_us += length_us
        if layout.pp > 1 and chunks:
            events.append(_slice("bubble", replica.index, at_us, (layout.pp - 1) * longest_us))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _slice(name: str, process: int, start_us: float, length_us: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": process, "tid": 0, "ts": start_us, "dur": length_us}


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
