"""The computations of the cells: simulated steps of a plan, and plans by every pattern."""

from __future__ import annotations

import re
import time
from typing import Any, Literal

import numpy as np

from experiments.bench import GPUS_PER_NODE, NUM_BUCKETS, Bench, dealt_time_s
from experiments.cells import Cell, Record, processor_seconds
from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup, make_plan
from lobra.layout.sequences import Batching
from lobra.planner.baselines import FUSED_BUCKETS
from lobra.planner.bucketed.buckets import bucket_index, static_buckets
from lobra.planner.deploy import deploy
from lobra.planner.deployment import Options, plan_entries
from lobra.planner.outcome import Outcome
from lobra.planner.simulate import Simulation, simulate, simulate_packed
from lobra.planner.workload import Workload

Mode = Literal["balance", "group", "even"]


def steps_cell(
    label: str,
    bench: Bench,
    plan: Plan,
    *,
    static: int | None = None,
    num_buckets: int = NUM_BUCKETS,
    mode: Mode = "balance",
    task: str | None = None,
) -> Cell:
    """Return the cell of a plan's simulated steps.

    ``static``: that many fixed buckets; ``mode``: how sequences are dispatched, ``even`` deals
    them out to the replicas of a homogeneous plan; ``task``: that task alone.
    """
    arguments = (bench, plan, static, num_buckets, mode, task)
    key = {
        "num_gpus": bench.num_gpus,
        "plan": plan_entries(plan),
        "static": static,
        "num_buckets": num_buckets if static is None else None,
        "mode": mode,
        "task": task,
    }
    return Cell(label, run_steps, arguments, key)


def run_steps(
    bench: Bench,
    plan: Plan,
    static: int | None,
    num_buckets: int,
    mode: Mode,
    task: str | None,
) -> Record:
    """Return the record of a plan's simulated steps, or why it cannot run them.

    All GPUs of the bench are charged and may be idle, whether the plan uses them or not.
    """
    workload = bench.workload if task is None else bench.task(task)
    try:
        if mode == "even":
            assert static is not None
            run = _dealt(bench, plan, workload, static)
        else:
            run = simulate(
                plan,
                workload,
                bench.costs.cost_model,
                bench.num_steps,
                num_buckets=num_buckets if static is None else static,
                static=static is not None,
                mode=mode,
            )
    except ConfigError as error:
        return {"plan": str(plan), "failed": str(error)}
    return _record(bench, plan, run)


def _record(bench: Bench, plan: Plan, run: Simulation) -> Record:
    summary = run.summary()
    return {
        "plan": str(plan),
        "entries": plan_entries(plan),
        "num_gpus": bench.num_gpus,
        "gpus_used": plan.num_gpus,
        "step_time_s": run.step_time_s.tolist(),
        "tokens": run.tokens.tolist(),
        "padded_tokens": run.padded_tokens.tolist(),
        "idle": 1.0 - (1.0 - summary["idle"]) * plan.num_gpus / bench.num_gpus,
        "padding": summary["padding"],
        "dispatch_ms": summary["dispatch_ms"],
    }


def _dealt(bench: Bench, plan: Plan, workload: Workload, static: int) -> Simulation:
    buckets = static_buckets(static, workload.longest)
    busy, tokens, padded = [], [], []
    for lengths in workload.steps(bench.num_steps):
        counts = np.bincount(bucket_index(lengths, buckets), minlength=len(buckets))
        busy.append(dealt_time_s(counts, buckets, plan, bench.costs.cost_model))
        tokens.append(int(lengths.sum()))
        padded.append(int(counts @ buckets))
    return Simulation(
        "dealt evenly",
        plan,
        plan.num_gpus,
        np.stack(busy).max(axis=1),
        np.stack(busy),
        np.array(tokens),
        np.array(padded),
        np.zeros(len(busy)),
    )


def packed_cell(label: str, bench: Bench, plan: Plan) -> Cell:
    """Return the cell of a plan's simulated packed steps."""
    key = {"num_gpus": bench.num_gpus, "plan": plan_entries(plan), "batching": "packed"}
    return Cell(label, run_packed, (bench, plan), key)


def run_packed(bench: Bench, plan: Plan) -> Record:
    """Return the record of a plan's simulated packed steps."""
    cost_model = bench.costs.cost_model
    return _record(bench, plan, simulate_packed(plan, bench.workload, cost_model, bench.num_steps))


def sequential_cells(
    label: str,
    bench: Bench,
    plans: dict[str, Plan],
    mode: Mode = "even",
    static: int | None = FUSED_BUCKETS,
) -> list[Cell]:
    """Return the cells of Task-Sequential: every task alone, on a homogeneous plan of its own."""
    return [
        steps_cell(f"{label}: {task}", bench, plan, static=static, mode=mode, task=task)
        for task, plan in plans.items()
    ]


def together(records: list[Record], num_gpus: int) -> Record:
    """Return the record of tasks that run one after another; its step is the sum of theirs.

    Their idle shares are of all ``num_gpus`` GPUs.
    """
    times = np.sum([r["step_time_s"] for r in records], axis=0)
    tokens = np.sum([r["tokens"] for r in records], axis=0)
    padded = np.sum([r["padded_tokens"] for r in records], axis=0)
    busy = sum((1.0 - r["idle"]) * sum(r["step_time_s"]) for r in records)
    return {
        "plan": "one per task",
        "num_gpus": num_gpus,
        "gpus_used": max(r["gpus_used"] for r in records),
        "step_time_s": times.tolist(),
        "tokens": tokens.tolist(),
        "padded_tokens": padded.tolist(),
        "idle": 1.0 - busy / float(times.sum()),
        "padding": 1.0 - float(tokens.sum()) / float(padded.sum()),
        "dispatch_ms": float(np.sum([r["dispatch_ms"] for r in records])),
    }


def packed_deployment_cell(bench: Bench) -> Cell:
    """Return the cell of the plan for packed steps."""
    key = {"num_gpus": bench.num_gpus, "batching": "packed", "profile": bench.costs.digest}
    words = f"plan by EXACT, packed, on {bench.num_gpus} GPUs"
    arguments = (bench, "EXACT", False, None, "packed")
    return Cell(words, make_deployment, arguments, key, free_of=("steps",))


def deployment_cell(
    bench: Bench, pattern: str = "EXACT", proposal: bool = False, limit_s: float | None = None
) -> Cell:
    """Return the cell of a planner's bucketed plan; ``limit_s`` is for LobRA's patterns alone."""
    limit_s = None if pattern == "EXACT" else limit_s
    words = f"{pattern}{', proposed layouts' if proposal else ''} on {bench.num_gpus} GPUs"
    key = {
        "num_gpus": bench.num_gpus,
        "pattern": pattern,
        "proposal": proposal,
        "limit_s": limit_s,
        "profile": bench.costs.digest,
    }
    arguments = (bench, pattern, proposal, limit_s)
    return Cell(f"plan by {words}", make_deployment, arguments, key, free_of=("steps", "seed"))


def make_deployment(
    bench: Bench,
    pattern: str,
    proposal: bool,
    limit_s: float | None,
    batching: Batching = "bucketed",
) -> Record:
    """Return a planner's plan with its time, bound and gap, or why there is none.

    ``whole_s`` and ``processor_s`` are of the whole call: layouts, search, bound and sampled
    steps; ``search_s`` is what the planner itself reports.
    """
    options = Options(
        pattern=pattern,
        batching=batching,
        proposal=proposal,
        num_buckets=NUM_BUCKETS,
        gpus_per_node=GPUS_PER_NODE,
        time_limit_s=limit_s,
    )
    start, processor = time.perf_counter(), processor_seconds()
    try:
        found = deploy(
            bench.workload,
            bench.costs.memory,
            bench.costs.cost_model,
            bench.num_gpus,
            options,
            refused=bench.refused,
        )
    except ConfigError as error:
        return {
            "failed": str(error),
            "plan": "",
            "whole_s": time.perf_counter() - start,
            "processor_s": processor_seconds() - processor,
            "limit_s": limit_s,
        }
    outcome = found.outcome
    return {
        "whole_s": time.perf_counter() - start,
        "processor_s": processor_seconds() - processor,
        "plan": str(outcome.plan),
        "entries": plan_entries(outcome.plan),
        "num_gpus": outcome.plan.num_gpus,
        "layouts": len(found.candidates.chosen),
        "search_s": outcome.planner_time_s,
        "limit_s": limit_s,
        "proven": outcome.proven,
        "step_time_s": outcome.step_time_s,
        "objective_s": outcome.objective_s,
        "lower_bound_s": outcome.lower_bound_s,
        "gap": outcome.gap,
        "own_bound_s": own_bound_s(outcome),
    }


Choice = Literal["dealt", "balanced", "dynamic"]
CHOICES: tuple[Choice, ...] = ("dealt", "balanced", "dynamic")


def choice_cell(bench: Bench, how: Choice, task: str | None = None) -> Cell:
    """Return the cell of the best homogeneous plan: dealt evenly, balanced, or dynamic too."""
    key = {"num_gpus": bench.num_gpus, "how": how, "task": task}
    words = f"best plan, {how}: {task or 'all tasks'}, {bench.num_gpus} GPUs"
    return Cell(words, choose, (bench, how, task), key, free_of=("steps",))


def choose(bench: Bench, how: Choice, task: str | None) -> Record:
    """Return the best homogeneous plan for all tasks or one."""
    workload = bench.workload if task is None else bench.task(task)
    if how == "dealt":
        plan = bench.best_homogeneous(workload)
    else:
        plan = bench.best_balanced(workload, dynamic=how == "dynamic")
    return {"plan": str(plan), "entries": plan_entries(plan)}


def own_bound_s(outcome: Outcome) -> float | None:
    """Return the bound of a pattern's own objective; None where it has no objective of its own.

    A search that was stopped says in its notes by how much the objective may still fall.
    """
    if outcome.objective_s is None:
        return None
    if outcome.proven:
        return outcome.objective_s
    for note in outcome.notes:
        if match := re.search(r"may fall by ([\d.]+) ?%", note):
            return outcome.objective_s * (1.0 - float(match[1]) / 100.0)
    return None


def plan_in(record: dict[str, Any]) -> Plan:
    """Return the plan a record holds."""
    return make_plan(
        [
            ReplicaGroup(Layout(e["tp"], e["pp"]), e["replicas"], e["max_tokens"])
            for e in record["entries"]
        ]
    )
