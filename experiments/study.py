"""The studies: methods, ablation, buckets, planning time and scalability of one model's experiment.

Every function returns rows (dicts) of one CSV. Steps are drawn from the same seed everywhere, so
methods are compared on the same sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.bench import NUM_BUCKETS, Bench
from experiments.cells import Cell, CellStore, Record
from experiments.inputs import Costs
from experiments.published import Setup, parse_plan
from experiments.runs import (
    CHOICES,
    Mode,
    choice_cell,
    deployment_cell,
    plan_in,
    sequential_cells,
    steps_cell,
    together,
)
from experiments.statistics import mean_interval, reduction_interval
from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import Plan
from lobra.planner.baselines import FUSED_BUCKETS
from lobra.planner.bucketed.dispatch import dispatch_counts
from lobra.planner.bucketed.expected_batch import expect
from lobra.planner.candidates import PROPOSAL_MICRO_BATCHES, Candidate, tokens_per_gpu_second
from lobra.planner.dispatch import dispatch
from lobra.planner.step_time import pipeline_time
from lobra.planner.timeline import timeline
from lobra.profiler.cost_model import padded_work

Rows = list[dict[str, Any]]
SEQUENTIAL, FUSED = "Task-Sequential", "Task-Fused"
LOBRA, OURS, OURS_POWERS = "LobRA's plan", "our plan", "our plan, capacities as LobRA measures"
BALANCED = ", our dispatch"  # a baseline that is given what it lacks
DYNAMIC = f", our dispatch, {NUM_BUCKETS} dynamic buckets"  # all that ours has, but homogeneous
FIXED = f", {NUM_BUCKETS} fixed buckets"


def step_row(record: Record) -> dict[str, Any]:
    """Return the columns every simulated plan has: mean step and GPU-seconds with intervals.

    GPU-seconds are of all GPUs there are, also those a plan does not use.
    """
    step = mean_interval(np.array(record["step_time_s"]))
    gpus = record["num_gpus"]
    return {
        "plan": record["plan"],
        "num_gpus": gpus,
        "gpus_used": record["gpus_used"],
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


def reductions(record: Record, baselines: Mapping[str, Record]) -> dict[str, Any]:
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


def best_plans(
    bench: Bench, store: CellStore, tasks: list[str | None], group: str
) -> dict[tuple[str, str | None], Plan]:
    """Return the best homogeneous plans, by what they are best for and the task (None: all)."""
    cells = {(how, task): choice_cell(bench, how, task) for task in tasks for how in CHOICES}
    return dict(zip(cells, map(plan_in, store.get(list(cells.values()), group)), strict=True))


class Methods:
    """The methods of the published comparison on one bench, their plans and their records."""

    def __init__(self, bench: Bench, store: CellStore, setup: Setup) -> None:
        self.bench, self.store, self.setup = bench, store, setup
        powers = bench.in_powers_of_two()
        wanted = [deployment_cell(bench)]
        if powers is not bench:
            wanted.append(deployment_cell(powers))
        self.planned, *rounded = store.get(wanted, "plans")
        workload = bench.workload
        self.best = best_plans(bench, store, [None, *workload.lengths], "homogeneous plans")
        self.best_alone = {task: self.best["dealt", task] for task in workload.lengths}
        self.fused, self.fused_fits = bench.published_or_best(
            setup.fused, workload, self.best["dealt", None]
        )
        alone = {
            task: bench.published_or_best(setup.sequential[task], bench.task(task), best)
            for task, best in self.best_alone.items()
        }
        self.alone = {task: plan for task, (plan, _) in alone.items()}
        self.alone_fits = {task: fits for task, (_, fits) in alone.items()}
        self.plans = {"LobRA": bench.published_plan(setup.lobra), "ours": plan_in(self.planned)}
        self.rounded = plan_in(rounded[0]) if rounded else None
        self.task_records: dict[str, dict[str, Record]] = {}
        self.records = self._records()

    def baselines(self) -> dict[str, Record]:
        """Return what methods are compared with, by the column's name."""
        names = {
            "sequential": SEQUENTIAL,
            "fused": FUSED,
            "sequential_balanced": SEQUENTIAL + BALANCED,
            "fused_balanced": FUSED + BALANCED,
            "sequential_dynamic": SEQUENTIAL + DYNAMIC,
            "fused_dynamic": FUSED + DYNAMIC,
        }
        return {column: self.records[name] for column, name in names.items()}

    def _records(self) -> dict[str, Record]:
        bench = self.bench
        names = list(bench.workload.lengths)
        balanced = {task: self.best["balanced", task] for task in names}
        dynamic = {task: self.best["dynamic", task] for task in names}
        several: dict[str, list[Cell]] = {
            SEQUENTIAL: sequential_cells(SEQUENTIAL, bench, self.alone),
            f"{SEQUENTIAL}, best plans": sequential_cells(SEQUENTIAL, bench, self.best_alone),
            SEQUENTIAL + BALANCED: sequential_cells(
                SEQUENTIAL + BALANCED, bench, balanced, "balance"
            ),
            SEQUENTIAL + DYNAMIC: sequential_cells(
                SEQUENTIAL + DYNAMIC, bench, dynamic, "balance", None
            ),
        }
        single = {
            FUSED: steps_cell(FUSED, bench, self.fused, static=FUSED_BUCKETS, mode="even"),
            FUSED + BALANCED: steps_cell(
                FUSED + BALANCED, bench, self.best["balanced", None], static=FUSED_BUCKETS
            ),
            FUSED + DYNAMIC: steps_cell(FUSED + DYNAMIC, bench, self.best["dynamic", None]),
            LOBRA: steps_cell(LOBRA, bench, self.plans["LobRA"]),
            OURS: steps_cell(OURS, bench, self.plans["ours"]),
        }
        if self.rounded is not None:
            single[OURS_POWERS] = steps_cell(OURS_POWERS, bench, self.rounded)
        every = [cell for cells in several.values() for cell in cells] + list(single.values())
        found = dict(zip(map(id, every), self.store.get(every, "methods"), strict=True))
        check_steps({cell.label: found[id(cell)] for cell in every})
        records = {}
        for name, cells in several.items():
            own = [found[id(cell)] for cell in cells]
            self.task_records[name] = dict(zip(names, own, strict=True))
            records[name] = together(own, bench.num_gpus)
        return {**records, **{name: found[id(cell)] for name, cell in single.items()}}

    def rows(self) -> Rows:
        """Return the main table: every method against the baselines."""
        rows = method_rows(self.records, self.baselines())
        for row in rows:
            own = row["method"] == OURS
            row["planned_step_time_s"] = _rounded(self.planned["step_time_s"] if own else None)
            row["lower_bound_s"] = _rounded(self.planned["lower_bound_s"] if own else None)
        return rows

    def step_rows(self) -> Rows:
        """Return every method's sampled steps."""
        return [
            {
                "method": method,
                "step": step,
                "step_time_s": round(time_s, 6),
                "gpu_seconds": round(time_s * record["num_gpus"], 4),
                "tokens": record["tokens"][step],
                "padded_tokens": record["padded_tokens"][step],
            }
            for method, record in self.records.items()
            for step, time_s in enumerate(record["step_time_s"])
        ]

    def sequential_rows(self) -> Rows:
        """Return, per task, the published homogeneous plan and the one the cost model prefers."""
        rows = []
        for task, plan in self.best_alone.items():
            published = self.task_records[SEQUENTIAL][task]
            best = self.task_records[f"{SEQUENTIAL}, best plans"][task]
            theirs, own = (float(np.mean(r["step_time_s"])) for r in (published, best))
            text, fits = self.setup.sequential[task], self.alone_fits[task]
            rows.append(
                {
                    "task": task,
                    "longest": int(self.bench.workload.lengths[task].max()),
                    "published_plan": text,
                    "published_plan_fits": fits,
                    "our_plan": str(plan),
                    "same": text == str(plan),
                    "published_plan_step_s": round(theirs, 6) if fits else "",
                    "our_plan_step_s": round(own, 6),
                    "difference": round(own / theirs - 1.0, 5) if fits else "",
                }
            )
        return rows

    def ablation_rows(self) -> Rows:
        """Return the ablation: Task-Fused's rungs, then each rung on each plan.

        One thing is changed at a time: first Task-Fused is given as many buckets as the others
        have; its last rung has all that ours has, but replicas of one layout.
        """
        cells = {
            (owner, rung): steps_cell(
                f"{owner}, {rung}", self.bench, plan, static=static, mode=mode
            )
            for owner, plan in self.plans.items()
            for rung, (static, mode) in RUNGS.items()
        }
        cells[HOMOGENEOUS, DEALT] = steps_cell(
            FUSED + FIXED, self.bench, self.fused, static=NUM_BUCKETS, mode="even"
        )
        found = dict(zip(cells, self.store.get(list(cells.values()), "ablation"), strict=True))
        records = {
            (HOMOGENEOUS, DEALT_SEVEN): self.records[FUSED],
            (HOMOGENEOUS, DEALT): found.pop((HOMOGENEOUS, DEALT)),
            (HOMOGENEOUS, DYNAMIC_RUNG): self.records[FUSED + DYNAMIC],
            **found,
        }
        return ablation_table(records, self.baselines())

    def bucket_rows(self, numbers: tuple[int, ...]) -> Rows:
        """Return step time and padding of each plan over the number of dynamic buckets."""
        cells = {
            (owner, number): steps_cell(
                f"{owner}, {number} buckets", self.bench, plan, num_buckets=number
            )
            for owner, plan in self.plans.items()
            for number in numbers
        }
        records = self.store.get(list(cells.values()), "buckets")
        return [
            {"plan_of": owner, "buckets": number, **step_row(record)}
            for (owner, number), record in zip(cells, records, strict=True)
        ]


HOMOGENEOUS = "homogeneous"
DEALT_SEVEN, DEALT = "dealt evenly, as published", "dealt evenly"
DYNAMIC_RUNG = "balanced + dynamic buckets"
MEASURED_FUSED = "balanced dispatch, 7 buckets"  # real baselines have our dispatcher
BUCKETS_OF = {
    DEALT_SEVEN: f"{FUSED_BUCKETS} fixed",
    MEASURED_FUSED: f"{FUSED_BUCKETS} fixed",
    DYNAMIC_RUNG: f"{NUM_BUCKETS} dynamic",
}


def ablation_table(
    records: Mapping[tuple[str, str], Record], baselines: Mapping[str, Record]
) -> Rows:
    """Return a row per (owner of the plan, rung), with its buckets and what it saves.

    What could not run is left out: a fixed bucket longer than any replica holds.
    """
    baselines = dict(baselines)
    dealt = records.get((HOMOGENEOUS, DEALT), {"failed": ""})
    if "failed" not in dealt:
        baselines["fused_16_fixed"] = dealt
    return [
        {
            "plan_of": owner,
            "rung": rung,
            "buckets": BUCKETS_OF.get(rung, f"{NUM_BUCKETS} fixed"),
            **step_row(record),
            **reductions(record, baselines),
        }
        for (owner, rung), record in records.items()
        if "failed" not in record
    ]


def method_rows(records: Mapping[str, Record], baselines: Mapping[str, Record]) -> Rows:
    """Return a row per method: plan, mean step, GPU-seconds, and what it saves."""
    return [
        {"method": method, **step_row(record), **reductions(record, baselines)}
        for method, record in records.items()
    ]


RUNGS: dict[str, tuple[int | None, Mode]] = {
    "length-based dispatch": (NUM_BUCKETS, "group"),
    "balanced dispatch": (NUM_BUCKETS, "balance"),
    DYNAMIC_RUNG: (None, "balance"),
}

PATTERNS: tuple[tuple[str, str, bool], ...] = (
    ("EXACT, all layouts", "EXACT", False),
    ("BALANCE, all layouts", "BALANCE", False),
    ("BALANCE, proposed", "BALANCE", True),
    ("PRUNE, all layouts", "PRUNE", False),
    ("PRUNE, proposed", "PRUNE", True),
    ("GROUP, proposed", "GROUP", True),
)


def planning_rows(
    bench: Bench,
    store: CellStore,
    limit_s: float,
    *,
    published_s: Mapping[str, float | None] | None = None,
    published_plan: str = "",
    patterns: tuple[tuple[str, str, bool], ...] = PATTERNS,
) -> Rows:
    """Return every pattern's planning time, plan and quality.

    Capacities are powers of two, as LobRA measures them, so that as many layouts are looked at as
    there. ``limit_s`` applies to LobRA's patterns; EXACT keeps its own. ``seconds`` and
    ``processor_s`` are of the whole call, ``search_s`` of the planner's search alone;
    ``objective_s`` and ``own_bound_s`` are in LobRA's definition, ``step_time_s`` and
    ``lower_bound_s`` in the exact evaluator's.
    """
    bench = bench.in_powers_of_two()
    theirs = _expected_step_s(bench, published_plan)
    cells = [
        deployment_cell(bench, pattern, proposal, limit_s) for _, pattern, proposal in patterns
    ]
    rows = []
    records = store.get(cells, f"planning {bench.num_gpus} GPUs")
    for (label, _, _), record in zip(patterns, records, strict=True):
        known = published_s is not None and label in published_s
        stopped = record.get("proven") is False and record["limit_s"] is not None
        rows.append(
            {
                "num_gpus": bench.num_gpus,
                "tasks": len(bench.workload.lengths),
                "pattern": label,
                "layouts": record.get("layouts", ""),
                "seconds": round(record["whole_s"], 3),
                "processor_s": round(record["processor_s"], 3),
                "search_s": _rounded(record.get("search_s")),
                "limit_s": "" if record["limit_s"] is None else record["limit_s"],
                "stopped": stopped,
                "proven": record.get("proven", ""),
                "plan": record["plan"],
                "gpus_used": record.get("num_gpus", ""),
                "objective_s": _rounded(record.get("objective_s")),
                "own_bound_s": _rounded(record.get("own_bound_s")),
                "step_time_s": _rounded(record.get("step_time_s")),
                "lower_bound_s": _rounded(record.get("lower_bound_s")),
                "gap": _rounded(record.get("gap")),
                "published_s": _published(published_s[label]) if known and published_s else "",
                "published_plan": published_plan,
                "published_plan_step_s": _rounded(theirs),
                "same_plan": _same_plan(record["plan"], published_plan) if record["plan"] else "",
                "failed": record.get("failed", ""),
            }
        )
    return rows


def _expected_step_s(bench: Bench, text: str) -> float | None:
    """Return the expected batch's step on a published plan; None where it does not fit."""
    batch = expect(bench.workload, NUM_BUCKETS)
    try:
        plan = bench.published_plan(text)
        if not text or plan.max_tokens < bench.workload.longest:
            return None
    except ConfigError:
        return None
    found = dispatch_counts(batch.counts, batch.buckets, plan, bench.costs.cost_model)
    return found.step_time_s


def _same_plan(one: str, other: str) -> bool:
    return sorted(parse_plan(one)) == sorted(parse_plan(other))


def scale_rows(
    clusters: Mapping[int, tuple[Bench, CellStore, str | None]],
    column: str,
    inferred: tuple[int, ...] = (),
) -> Rows:
    """Return a scalability curve: Task-Fused, LobRA's plan where known, and ours.

    ``clusters``: per value of ``column`` the bench, its store and LobRA's plan; ``inferred``: the
    values for which that plan was not published but is the only one possible.
    """
    rows: Rows = []
    for value, (bench, store, lobra) in clusters.items():
        powers = bench.in_powers_of_two()
        planned = store.get([deployment_cell(bench), deployment_cell(powers)], f"plan {value}")
        ours, rounded = (plan_in(record) for record in planned)
        best = best_plans(bench, store, [None], f"homogeneous plans, {value} {column}")
        fused, balanced, dynamic = (best[how, None] for how in CHOICES)
        cells = {
            FUSED: steps_cell(FUSED, bench, fused, static=FUSED_BUCKETS, mode="even"),
            FUSED + FIXED: steps_cell(FUSED + FIXED, bench, fused, static=NUM_BUCKETS, mode="even"),
            FUSED + BALANCED: steps_cell(FUSED + BALANCED, bench, balanced, static=FUSED_BUCKETS),
            FUSED + DYNAMIC: steps_cell(FUSED + DYNAMIC, bench, dynamic),
            OURS: steps_cell(OURS, bench, ours),
            OURS_POWERS: steps_cell(OURS_POWERS, bench, rounded),
        }
        if lobra is not None:
            cells[LOBRA] = steps_cell(LOBRA, bench, bench.published_plan(lobra))
        records = store.get(list(cells.values()), f"{value} {column}")
        check_steps(dict(zip(cells, records, strict=True)))
        rows += [
            {
                column: value,
                "method": method,
                "plan_is": _origin(method, value in inferred),
                **step_row(record),
            }
            for method, record in zip(cells, records, strict=True)
        ]
    return rows


def _origin(method: str, inferred: bool) -> str:
    """Say where a method's plan is from."""
    if method != LOBRA:
        return "best here"
    return "inferred" if inferred else "published"


def timeline_rows(bench: Bench, plans: Mapping[str, Plan]) -> Rows:
    """Return the micro-batches of every replica in the first sampled step, per plan."""
    lengths = next(bench.workload.steps(1))
    rows = []
    for owner, plan in plans.items():
        assignment = dispatch(lengths, plan, bench.costs.cost_model, num_buckets=NUM_BUCKETS)
        replicas = timeline(assignment, plan, bench.costs.cost_model)
        for replica, trace in zip(plan.replicas, replicas, strict=True):
            rows += [
                {
                    "plan_of": owner,
                    "replica": replica.index,
                    "layout": str(replica.layout),
                    "start_s": round(one.start_s, 6),
                    "end_s": round(one.start_s + one.length_s, 6),
                    "what": one.name,
                }
                for one in trace.stages[0]
            ]
    return rows


def homogeneous_step_s(costs: Costs, plan: str, length: int, number: int) -> float:
    """Return the cost model's seconds of a step of ``number`` single sequences per replica."""
    ((tp, pp, _),) = parse_plan(plan)
    work = padded_work(1, length)
    time_ms = float(costs.cost_model.micro_batch_time(Layout(tp, pp), *work).total_ms)
    return pipeline_time([time_ms] * number, pp) / 1000.0


def throughput(costs: Costs, layout: str, length: int) -> float:
    """Return thousand tokens/s/GPU of a layout that is full, as LobRA's proposal reckons it."""
    ((tp, pp, _),) = parse_plan(layout)
    candidate = Candidate(Layout(tp, pp), costs.memory.max_tokens(tp, pp))
    return tokens_per_gpu_second(candidate, costs.cost_model, length) / 1000.0


def no_bubble_throughput(costs: Costs, layout: str, length: int) -> float:
    """Return the same without the pipeline's bubble."""
    ((_, pp, _),) = parse_plan(layout)
    return (
        throughput(costs, layout, length)
        * (PROPOSAL_MICRO_BATCHES + pp - 1)
        / PROPOSAL_MICRO_BATCHES
    )


def check_steps(records: Mapping[str, Record]) -> None:
    """Raise ConfigError naming the methods that could not run."""
    problems = [f"{name}: {r['failed']}" for name, r in records.items() if "failed" in r]
    if problems:
        raise ConfigError(problems)


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 6)


def _published(value: float | None) -> float | str:
    return "over 3600" if value is None else value
