"""The simulator: steps of a plan under the cost model, without GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lobra.layout.plan import Plan
from lobra.planner.bucketed.buckets import bucket_index, make_buckets, static_buckets
from lobra.planner.bucketed.dispatch import Mode
from lobra.planner.bucketed.greedy import lpt_times_s
from lobra.planner.dispatch import dispatch
from lobra.planner.packed.dispatch import dispatch_packed, packed_costs
from lobra.planner.step_time import sync_time_s
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel


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
    """Return what ``num_steps`` padded steps of a plan take, from ``first_step`` on.

    They are steps of the run that `lobra train` makes of the workload: fewer if all its tasks end
    earlier (at least one must be left).

    ``mode`` None dispatches by greedy LPT (``lpt_times_s``) instead of the dispatcher. ``static``:
    the fixed set of ``num_buckets`` buckets instead of each step's own.
    """

    def run(lengths: np.ndarray) -> tuple[np.ndarray, int]:
        buckets = buckets_of_step(lengths, num_buckets, static, workload.longest)
        if mode is None:
            padded = int(buckets[bucket_index(lengths, buckets)].sum())
            return lpt_times_s(lengths, buckets, plan, cost_model), padded
        assignment = dispatch(lengths, plan, cost_model, buckets=buckets, mode=mode)
        return assignment.replica_time_s, assignment.padded_tokens

    return _simulated(name, plan, cost_model, workload.steps(num_steps, first_step), run)


def simulate_packed(
    plan: Plan, workload: Workload, cost_model: CostModel, num_steps: int
) -> Simulation:
    """Return what the first ``num_steps`` steps of a run take on a plan, packed; see `simulate`."""
    costs = packed_costs(plan, cost_model)

    def run(lengths: np.ndarray) -> tuple[np.ndarray, int]:
        assignment = dispatch_packed(lengths, plan, costs)
        return assignment.replica_time_s, assignment.padded_tokens

    return _simulated("packed", plan, cost_model, workload.steps(num_steps), run)


def _simulated(
    name: str,
    plan: Plan,
    cost_model: CostModel,
    steps: Iterable[np.ndarray],
    run: Callable[[np.ndarray], tuple[np.ndarray, int]],
) -> Simulation:
    """Return the simulation of steps; ``run`` returns replicas' seconds and padded tokens."""
    sync_s = sync_time_s(plan, cost_model)
    times, busy, tokens, padded, dispatch_s = [], [], [], [], []
    for lengths in steps:
        start = time.perf_counter()
        replica_s, padded_tokens = run(lengths)
        dispatch_s.append(time.perf_counter() - start)
        times.append(float(replica_s.max()) + sync_s)
        busy.append(replica_s)
        tokens.append(int(lengths.sum()))
        padded.append(padded_tokens)
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


def buckets_of_step(
    lengths: np.ndarray, num_buckets: int, static: bool, longest: int
) -> np.ndarray:
    """Return int64 [R]: the fixed set of so many buckets up to ``longest``, or the step's own."""
    return static_buckets(num_buckets, longest) if static else make_buckets(lengths, num_buckets)
