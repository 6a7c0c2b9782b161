"""The studies: methods, ablation, buckets, planning time and scalability of one model's experiment.

Every function returns rows (dicts) of one CSV. Steps are drawn from the same seed everywhere, so
methods are compared on the same sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.cells import CellStore, Record
from experiments.inputs import Costs
from experiments.published import parse_plan
from experiments.statistics import mean_interval, reduction_interval
from planner.candidates import Candidate, all_candidates, tokens_per_gpu_second
from planner.deploy import Options, deploy, plan_entries
from planner.dispatch import Mode, dispatch
from planner.layout import Layout
from planner.plan import Plan, ReplicaGroup, make_plan
from planner.planners import homogeneous
from planner.planners.base import Problem
from planner.simulate import FUSED_BUCKETS, chrome_trace, simulate, steps_of
from planner.workload import Workload, expect
from profiler.profiles import layout_problem_of
from tasks.errors import ConfigError

GPUS_PER_NODE = 8
NUM_BUCKETS = 16
Rows = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Bench:
    """One workload on one cluster under one cost model: everything a cell needs."""

    model: str
    num_gpus: int
    workload: Workload
    costs: Costs
    num_steps: int
    seed: int

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
        whole = self.workload
        return Workload(
            {name: whole.lengths[name]},
            {name: whole.batch_sizes[name]},
            {name: whole.clipped[name]},
        )

    def best_homogeneous(self, workload: Workload) -> Plan:
        """Return the homogeneous plan with the shortest expected step over LobRA's seven buckets.

        Raises
        ------
        ConfigError
            If no layout holds the longest bucket.
        """
        batch = expect(workload, FUSED_BUCKETS, static=True)
        problem = Problem(
            batch.counts,
            batch.buckets,
            self.candidates(),
            self.num_gpus,
            self.costs.cost_model,
            GPUS_PER_NODE,
        )
        found = homogeneous.find(problem)
        if found is None:
            raise ConfigError(f"{self.model}: no homogeneous plan on {self.num_gpus} GPUs")
        return found.plan


def run_steps(
    bench: Bench,
    plan: Plan,
    *,
    static: int | None = None,
    num_buckets: int = NUM_BUCKETS,
    mode: Mode | None = "balance",
    workload: Workload | None = None,
    seed: int | None = None,
) -> Record:
    """Return the record of a plan's simulated steps; ``static``: that many fixed buckets."""
    run = simulate(
        plan,
        bench.workload if workload is None else workload,
        bench.costs.cost_model,
        bench.num_steps,
        seed=bench.seed if seed is None else seed,
        num_buckets=num_buckets if static is None else static,
        static=static is not None,
        mode=mode,
    )
    summary = run.summary()
    return {
        "plan": str(plan),
        "entries": plan_entries(plan),
        "num_gpus": plan.num_gpus,
        "step_time_s": run.step_time_s.tolist(),
        "tokens": run.tokens.tolist(),
        "padded_tokens": run.padded_tokens.tolist(),
        "idle": summary["idle"],
        "padding": summary["padding"],
        "dispatch_ms": summary["dispatch_ms"],
    }


def sequential(bench: Bench, published: dict[str, str] | None = None) -> Record:
    """Return Task-Sequential: one task after another, each on a homogeneous plan of its own.

    ``published`` gives every task's plan; without it, the best by the cost model.
    """
    records, plans, skipped = [], {}, []
    for number, task in enumerate(bench.workload.lengths):
        alone = bench.task(task)
        plan = bench.best_homogeneous(alone)
        if published is not None:
            try:
                wanted = bench.published_plan(published[task])
                records.append(_alone(bench, wanted, alone, number))
                plans[task] = str(wanted)
                continue
            except ConfigError:
                skipped.append(task)  # does not fit under this profile: the best that does
        records.append(_alone(bench, plan, alone, number))
        plans[task] = str(plan)
    busy = sum((1.0 - r["idle"]) * sum(r["step_time_s"]) for r in records)
    tokens = np.sum([r["tokens"] for r in records], axis=0)
    padded = np.sum([r["padded_tokens"] for r in records], axis=0)
    times = np.sum([r["step_time_s"] for r in records], axis=0)
    return {
        "plan": "one per task",
        "plans": plans,
        "replaced": skipped,
        "num_gpus": bench.num_gpus,
        "step_time_s": times.tolist(),
        "tokens": tokens.tolist(),
        "padded_tokens": padded.tolist(),
        "idle": 1.0 - busy / float(times.sum()),
        "padding": 1.0 - float(tokens.sum()) / float(padded.sum()),
        "dispatch_ms": float(np.sum([r["dispatch_ms"] for r in records])),
    }


def _alone(bench: Bench, plan: Plan, workload: Workload, number: int) -> Record:
    return run_steps(bench, plan, static=FUSED_BUCKETS, workload=workload, seed=bench.seed + number)


def make_deployment(
    bench: Bench, pattern: str, proposal: bool, limit_s: float | None = None
) -> Record:
    """Return a planner's plan with its time, bound and gap, or why there is none."""
    options = Options(
        pattern=pattern,
        proposal=proposal,
        num_buckets=NUM_BUCKETS,
        gpus_per_node=GPUS_PER_NODE,
        time_limit_s=limit_s,
    )
    start = time.perf_counter()
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
            "planner_time_s": time.perf_counter() - start,
            "limit_s": limit_s,
        }
    outcome = found.outcome
    return {
        "plan": str(outcome.plan),
        "entries": plan_entries(outcome.plan),
        "num_gpus": outcome.plan.num_gpus,
        "planner_time_s": outcome.planner_time_s,
        "limit_s": limit_s,
        "proven": outcome.proven,
        "step_time_s": outcome.step_time_s,
        "objective_s": outcome.objective_s,
        "lower_bound_s": outcome.lower_bound_s,
        "gap": outcome.gap,
    }


def plan_of(record: Record) -> Plan:
    """Return the plan a record holds."""
    return make_plan(
        [
            ReplicaGroup(Layout(e["tp"], e["pp"]), e["replicas"], e["max_tokens"])
            for e in record["entries"]
        ]
    )


def step_row(record: Record) -> dict[str, Any]:
    """Return the columns every simulated plan has: mean step and GPU-seconds with intervals."""
    step = mean_interval(np.array(record["step_time_s"]))
    gpus = record["num_gpus"]
    return {
        "plan": record["plan"],
        "num_gpus": gpus,
        "steps": len(record["step_time_s"]),
        "step_time_s": round(step.value, 6),
        "step_time_low_s": round(step.low, 6),
        "step_time_high_s": round(step.high, 6),
        "gpu_seconds": round(step.value * gpus, 4),
        "gpu_seconds_low": round(step.low * gpus, 4),
        "gpu_seconds_high": round(step.high * gpus, 4),
        "idle": round(record["idle"], 6),
        "padding": round(record["padding"], 6),
        "dispatch_ms": round(record["dispatch_ms"], 3),
    }


def reductions(record: Record, baselines: dict[str, Record]) -> dict[str, Any]:
    """Return, per baseline, by what share of its GPU-seconds the record needs fewer."""
    columns: dict[str, Any] = {}
    own = np.array(record["step_time_s"]) * record["num_gpus"]
    for name, baseline in baselines.items():
        other = np.array(baseline["step_time_s"]) * baseline["num_gpus"]
        saved = reduction_interval(own, other)
        columns[f"less_than_{name}"] = round(saved.value, 6)
        columns[f"less_than_{name}_low"] = round(saved.low, 6)
        columns[f"less_than_{name}_high"] = round(saved.high, 6)
    return columns


def method_records(
    bench: Bench, store: CellStore, fused: str, lobra: str, alone: dict[str, str]
) -> dict[str, Record]:
    """Return the records of the methods of the main table, by the method's name."""
    get = store.get
    best = get("deploy_EXACT", lambda: make_deployment(bench, "EXACT", False))
    steps: dict[str, tuple[str, Callable[[], Record]]] = {
        "Task-Sequential": ("sequential", lambda: sequential(bench)),
        "Task-Sequential, published plans": (
            "sequential_published",
            lambda: sequential(bench, alone),
        ),
        "Task-Fused": (
            "fused",
            lambda: run_steps(bench, bench.best_homogeneous(bench.workload), static=FUSED_BUCKETS),
        ),
        "Task-Fused, published plan": (
            "fused_published",
            lambda: run_steps(bench, bench.published_plan(fused), static=FUSED_BUCKETS),
        ),
        "LobRA's plan": ("lobra", lambda: run_steps(bench, bench.published_plan(lobra))),
        "our plan": ("ours", lambda: run_steps(bench, plan_of(best))),
    }
    return {method: get(f"method_{name}", run) for method, (name, run) in steps.items()}


def method_rows(records: dict[str, Record], planned: Record | None) -> Rows:
    """Return the main table: every method against Task-Sequential and Task-Fused."""
    baselines = {"sequential": records["Task-Sequential"], "fused": records["Task-Fused"]}
    rows = []
    for method, record in records.items():
        row = {"method": method, **step_row(record), **reductions(record, baselines)}
        if planned is not None:
            own = method == "our plan"
            row["planned_step_time_s"] = _rounded(planned["step_time_s"] if own else None)
            row["lower_bound_s"] = _rounded(planned["lower_bound_s"] if own else None)
        rows.append(row)
    return rows


RUNGS: dict[str, tuple[str, int | None, Mode]] = {
    "length-based dispatch": ("group", NUM_BUCKETS, "group"),
    "balanced dispatch": ("balance", NUM_BUCKETS, "balance"),
    "balanced + dynamic buckets": ("dynamic", None, "balance"),
}


def ablation_rows(
    bench: Bench, store: CellStore, plans: dict[str, Plan], baselines: dict[str, Record]
) -> Rows:
    """Return the ablation: homogeneous, then each rung on each plan (16 buckets)."""
    rows = [
        {
            "plan_of": "homogeneous",
            "rung": "homogeneous",
            **step_row(baselines["fused"]),
            **reductions(baselines["fused"], baselines),
        }
    ]
    for owner, plan in plans.items():
        for rung, (name, static, mode) in RUNGS.items():

            def compute(
                plan: Plan = plan, static: int | None = static, mode: Mode = mode
            ) -> Record:
                try:
                    return run_steps(bench, plan, static=static, mode=mode)
                except ConfigError as error:
                    return {"failed": str(error)}

            record = store.get(f"ablation_{owner}_{name}", compute)
            if "failed" in record:  # a fixed bucket longer than any replica holds
                continue
            rows.append(
                {
                    "plan_of": owner,
                    "rung": rung,
                    **step_row(record),
                    **reductions(record, baselines),
                }
            )
    return rows


def bucket_rows(
    bench: Bench, store: CellStore, plans: dict[str, Plan], numbers: tuple[int, ...]
) -> Rows:
    """Return step time and padding of each plan over the number of dynamic buckets."""
    rows = []
    for owner, plan in plans.items():
        for number in numbers:

            def compute(plan: Plan = plan, number: int = number) -> Record:
                return run_steps(bench, plan, num_buckets=number)

            record = store.get(f"buckets_{owner}_{number}", compute)
            rows.append({"plan_of": owner, "buckets": number, **step_row(record)})
    return rows


PATTERNS: tuple[tuple[str, str, bool], ...] = (
    ("EXACT, all layouts", "EXACT", False),
    ("BALANCE, all layouts", "BALANCE", False),
    ("BALANCE, proposed", "BALANCE", True),
    ("PRUNE, all layouts", "PRUNE", False),
    ("PRUNE, proposed", "PRUNE", True),
    ("GROUP, proposed", "GROUP", True),
)


def planning_rows(
    bench: Bench, store: CellStore, limit_s: float, published: dict[str, float | None] | None
) -> Rows:
    """Return every pattern's planning time, plan and quality; limits apply to LobRA's patterns."""
    rows = []
    for label, pattern, proposal in PATTERNS:
        limit = None if pattern == "EXACT" else limit_s

        def compute(
            pattern: str = pattern, proposal: bool = proposal, limit: float | None = limit
        ) -> Record:
            return make_deployment(bench, pattern, proposal, limit)

        name = f"deploy_{pattern}{'_proposed' if proposal else ''}"
        if pattern != "EXACT":
            name += f"_{limit_s:g}s"
        record = store.get(f"{name}_{bench.num_gpus}gpus", compute)
        known = published is not None and label in published
        rows.append(
            {
                "num_gpus": bench.num_gpus,
                "pattern": label,
                "seconds": round(record["planner_time_s"], 3),
                "limit_s": "" if record["limit_s"] is None else record["limit_s"],
                "proven": record.get("proven", ""),
                "plan": record["plan"],
                "step_time_s": _rounded(record.get("step_time_s")),
                "lower_bound_s": _rounded(record.get("lower_bound_s")),
                "gap": _rounded(record.get("gap")),
                "published_s": _published(published[label]) if known and published else "",
                "failed": record.get("failed", ""),
            }
        )
    return rows


def scale_rows(bench: Bench, store: CellStore, name: str, lobra: str | None) -> Rows:
    """Return one point of a scalability curve: Task-Fused, our plan, LobRA's where published."""
    runs: dict[str, Callable[[], Record]] = {
        "Task-Fused": lambda: run_steps(
            bench, bench.best_homogeneous(bench.workload), static=FUSED_BUCKETS
        ),
        "our plan": lambda: run_steps(
            bench,
            plan_of(
                store.get(f"deploy_EXACT_{name}", lambda: make_deployment(bench, "EXACT", False))
            ),
        ),
    }
    if lobra is not None:
        runs["LobRA's plan"] = lambda: run_steps(bench, bench.published_plan(lobra))
    rows = []
    for method, run in runs.items():
        record = store.get(f"scale_{name}_{method.replace(' ', '_')}", run)
        rows.append({"method": method, **step_row(record), "gpus_available": bench.num_gpus})
    return rows


def timeline_rows(bench: Bench, plans: dict[str, Plan]) -> Rows:
    """Return the micro-batches of every replica in the first sampled step, per plan."""
    lengths = next(steps_of(bench.workload, 1, bench.seed))
    rows = []
    for owner, plan in plans.items():
        assignment = dispatch(lengths, plan, bench.costs.cost_model, num_buckets=NUM_BUCKETS)
        layouts = [str(replica.layout) for replica in plan.replicas]
        for event in chrome_trace(assignment, plan, bench.costs.cost_model)["traceEvents"]:
            if event["ph"] != "X":
                continue
            rows.append(
                {
                    "plan_of": owner,
                    "replica": event["pid"],
                    "layout": layouts[event["pid"]],
                    "start_s": round(event["ts"] / 1e6, 6),
                    "end_s": round((event["ts"] + event["dur"]) / 1e6, 6),
                    "what": event["name"],
                }
            )
    return rows


def homogeneous_step_s(costs: Costs, plan: str, length: int, chunks: int) -> float:
    """Return the cost model's seconds of a step of ``chunks`` single sequences per replica."""
    ((tp, pp, _),) = parse_plan(plan)
    chunk_ms = float(np.asarray(costs.cost_model.chunk_time_ms(tp, pp, 1, length)))
    return chunk_ms * (chunks + pp - 1) / 1000.0


def throughput(costs: Costs, layout: str, length: int) -> float:
    """Return thousand tokens/s/GPU of a layout that is full, as LobRA's proposal reckons it."""
    ((tp, pp, _),) = parse_plan(layout)
    candidate = Candidate(Layout(tp, pp), costs.memory.max_tokens(tp, pp))
    return tokens_per_gpu_second(candidate, costs.cost_model, length) / 1000.0


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 6)


def _published(value: float | None) -> float | str:
    return "over 3600" if value is None else value
