"""The studies beside the methods': planning time, scalability, timelines, homogeneous plans.

Every function returns rows (dicts) of one CSV, or a figure of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.bench import NUM_BUCKETS, Bench
from experiments.cells import CellStore
from experiments.inputs import Costs
from experiments.methods import (
    BALANCED,
    DYNAMIC,
    FIXED,
    FUSED,
    LOBRA,
    OURS,
    OURS_POWERS,
    Rows,
    best_plans,
    check_steps,
    rounded_or_empty,
    step_row,
)
from experiments.published import parse_plan
from experiments.runs import (
    CHOICES,
    deployment_cell,
    plan_in,
    steps_cell,
)
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
        deployment_cell(bench, pattern, proposal, limit_s) for _, pattern, proposal in PATTERNS
    ]
    rows = []
    records = store.get(cells, f"planning {bench.num_gpus} GPUs")
    for (label, _, _), record in zip(PATTERNS, records, strict=True):
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
                "search_s": rounded_or_empty(record.get("search_s")),
                "limit_s": "" if record["limit_s"] is None else record["limit_s"],
                "stopped": stopped,
                "proven": record.get("proven", ""),
                "plan": record["plan"],
                "gpus_used": record.get("num_gpus", ""),
                "objective_s": rounded_or_empty(record.get("objective_s")),
                "own_bound_s": rounded_or_empty(record.get("own_bound_s")),
                "step_time_s": rounded_or_empty(record.get("step_time_s")),
                "lower_bound_s": rounded_or_empty(record.get("lower_bound_s")),
                "gap": rounded_or_empty(record.get("gap")),
                "published_s": _published(published_s[label]) if known and published_s else "",
                "published_plan": published_plan,
                "published_plan_step_s": rounded_or_empty(theirs),
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
        replicas = timeline(assignment, lengths, plan, bench.costs.cost_model)
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


def _published(value: float | None) -> float | str:
    return "over 3600" if value is None else value
