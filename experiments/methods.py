"""The methods that are compared, on one model's experiment: their steps, ablation and buckets.

Every function of rows returns those (dicts) of one CSV. Steps are drawn from the same seed
everywhere, so methods are compared on the same sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.bench import NUM_BUCKETS, Bench
from experiments.cells import Cell, CellStore, Record
from experiments.published import Setup
from experiments.runs import (
    CHOICES,
    Mode,
    choice_cell,
    deployment_cell,
    packed_cell,
    packed_deployment_cell,
    plan_in,
    sequential_cells,
    steps_cell,
    together,
)
from experiments.statistics import mean_interval, reduction_interval
from lobra.common.errors import ConfigError
from lobra.layout.plan import Plan
from lobra.planner.baselines import FUSED_BUCKETS

Rows = list[dict[str, Any]]
SEQUENTIAL, FUSED = "Task-Sequential", "Task-Fused"
LOBRA, OURS, OURS_POWERS = "LobRA's plan", "our plan", "our plan, capacities as LobRA measures"
PACKED = {  # by how many times the capacities are: activations take so much less memory
    1: "packed",
    2: "packed, half the activation memory",
    4: "packed, a quarter",
}
BALANCED = ", our dispatch"  # a baseline that is given what it lacks
DYNAMIC = f", our dispatch, {NUM_BUCKETS} dynamic buckets"  # all that ours has, but homogeneous
FIXED = f", {NUM_BUCKETS} fixed buckets"

HOMOGENEOUS = "homogeneous"
DEALT_SEVEN, DEALT = "dealt evenly, as published", "dealt evenly"
DYNAMIC_RUNG = "balanced + dynamic buckets"
MEASURED_FUSED = "balanced dispatch, 7 buckets"  # real baselines have our dispatcher
BUCKETS_OF = {
    DEALT_SEVEN: f"{FUSED_BUCKETS} fixed",
    MEASURED_FUSED: f"{FUSED_BUCKETS} fixed",
    DYNAMIC_RUNG: f"{NUM_BUCKETS} dynamic",
}
RUNGS: dict[str, tuple[int | None, Mode]] = {
    "length-based dispatch": (NUM_BUCKETS, "group"),
    "balanced dispatch": (NUM_BUCKETS, "balance"),
    DYNAMIC_RUNG: (None, "balance"),
}


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
        packed = {bench.with_capacities(times): name for times, name in PACKED.items()}
        wanted += map(packed_deployment_cell, packed)
        self.planned, *others = store.get(wanted, "plans")
        rounded = others[: -len(packed)]
        self.packed = {
            name: (own, record)
            for (own, name), record in zip(packed.items(), others[-len(packed) :], strict=True)
        }
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
        for name, (own, record) in self.packed.items():
            single[name] = packed_cell(name, own, plan_in(record))
        every = [cell for cells in several.values() for cell in cells] + list(single.values())
        found = dict(zip(map(id, every), self.store.get(every, "methods"), strict=True))
        check_steps({cell.label: found[id(cell)] for cell in every})
        records = {}
        for name, cells in several.items():
            of_tasks = [found[id(cell)] for cell in cells]
            self.task_records[name] = dict(zip(names, of_tasks, strict=True))
            records[name] = together(of_tasks, bench.num_gpus)
        return {**records, **{name: found[id(cell)] for name, cell in single.items()}}

    def rows(self) -> Rows:
        """Return the main table: every method against the baselines."""
        rows = method_rows(self.records, self.baselines())
        known = {OURS: self.planned, **{name: record for name, (_, record) in self.packed.items()}}
        for row in rows:
            planned = known.get(row["method"], {})
            row["planned_step_time_s"] = rounded_or_empty(planned.get("step_time_s"))
            row["lower_bound_s"] = rounded_or_empty(planned.get("lower_bound_s"))
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


def check_steps(records: Mapping[str, Record]) -> None:
    """Raise ConfigError naming the methods that could not run."""
    problems = [f"{name}: {r['failed']}" for name, r in records.items() if "failed" in r]
    if problems:
        raise ConfigError(problems)


def rounded_or_empty(value: float | None) -> float | str:
    """Return a figure for a table; what is not known is an empty cell."""
    return "" if value is None else round(value, 6)
