"""``lobra simulate``: steps of a plan under the cost model, without GPUs."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from lobra.commands.output import write_problem, written
from lobra.commands.planning import PlanningOptions, read_inputs
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.common.models import up_to
from lobra.common.options import Int, Within, as_options, within_bounds
from lobra.layout.plan import load_plan
from lobra.layout.sequences import Batching
from lobra.layout.trace import TRACE_FILE, trace_text
from lobra.planner.baselines import baselines, ladder
from lobra.planner.candidates import all_candidates
from lobra.planner.dispatch import dispatch
from lobra.planner.packed.dispatch import dispatch_packed, packed_costs
from lobra.planner.simulate import Simulation
from lobra.planner.timeline import timeline
from lobra.profiler.capacity import memory_profile_for
from lobra.profiler.lookup import planning_paths
from lobra.report.experiment_tables import YOURS


@as_options
@dataclass(frozen=True, kw_only=True)
class SimulateOptions(PlanningOptions):
    """What is simulated, and where the result goes.

    Parameters
    ----------
    steps
        Steps to simulate, as long as a task runs.
    no_baselines
        Only the plan itself.
    output_dir
        Write simulation.json, steps.csv and trace.json there.
    """

    steps: Annotated[Int, Within(up_to(100_000))] = 20
    no_baselines: bool = False
    output_dir: Path | None = None


def simulate(*, options: SimulateOptions) -> int:
    """Run steps of a plan under the cost model, without GPUs, and the baselines it is compared to.

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    options, problems = within_bounds(options)
    if options.output_dir:
        problem = write_problem("--output-dir", options.output_dir / "simulation.json")
        problems += [problem] if problem else []
    console = Console(stderr=options.json)
    plan = None
    with problems.noted():
        plan = load_plan(options.strategy_config)
    inputs = read_inputs(options, problems, with_memory=False)
    workload, cost_model = inputs.workload, inputs.cost_model
    assert plan
    for note in inputs.notes:
        console.print(f"note: {note}", soft_wrap=True)
    batching: Batching = plan.meta.get("batching", "packed")
    with console.status("simulating ..."):
        runs: list[Simulation] = []
        left_out: list[str] = []
        if not options.no_baselines:
            try:
                _, path = planning_paths(
                    options.model, len(inputs.tasks), options.time_profile, options.memory_profile
                )
                memory, notes = memory_profile_for(options.model, inputs.tasks, path)
            except ConfigError as error:
                if options.memory_profile is not None:
                    raise
                left_out = [f"Task-Sequential and Task-Fused: {error}"]
            else:
                for note in notes:
                    console.print(f"note: {note}")
                candidates = all_candidates(
                    memory,
                    cost_model,
                    plan.num_gpus,
                    workload.longest,
                    options.gpus_per_node,
                    options.layout_problem,
                )
                runs, left_out = baselines(
                    workload,
                    candidates.chosen,
                    cost_model,
                    plan.num_gpus,
                    options.steps,
                    gpus_per_node=options.gpus_per_node,
                )
        rungs, others = ladder(
            plan,
            workload,
            cost_model,
            options.steps,
            num_buckets=options.num_buckets,
            batching=batching,
        )
        compared = len(runs)
        runs += rungs[-1:] if options.no_baselines else rungs
        left_out += [] if options.no_baselines else others
    summaries = [{**run.summary(), "of_plan": place >= compared} for place, run in enumerate(runs)]
    console.print(_table(summaries))
    console.print(f"{YOURS}: {plan}")
    for entry in summaries:
        if not entry["of_plan"]:
            console.print(f"{entry['name']}: {entry['plan']}")
    for reason in left_out:
        console.print(f"left out: {reason}", soft_wrap=True)
    if options.output_dir:
        drawn = next(workload.steps(1))
        if batching == "packed":
            costs = packed_costs(plan, cost_model)
            assignment = dispatch_packed(drawn, plan, costs)
        else:
            assignment = dispatch(drawn, plan, cost_model, num_buckets=options.num_buckets)
        folder = options.output_dir
        trace = trace_text(timeline(assignment, drawn, plan, cost_model))
        with written("--output-dir", folder):
            write_atomic(folder / "steps.csv", _csv(runs))
            write_atomic(folder / TRACE_FILE, trace)
            write_atomic(folder / "simulation.json", json.dumps(summaries, indent=2) + "\n")
        console.print(f"written: {folder}/simulation.json, steps.csv, {TRACE_FILE}")
    if options.json:
        print(json.dumps({"plan": str(plan), "runs": summaries, "left_out": left_out}))
    return 0


def _table(summaries: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{summaries[0]['steps']} simulated steps (ms: to dispatch one)")
    table.add_column("what")
    for column in ("mean s", "p50 s", "p99 s", "GPU-s", "idle%", "pad%", "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in summaries:
        table.add_row(
            f"{YOURS}: {entry['name']}" if entry["of_plan"] else entry["name"],
            *(f"{entry[key]:.2f}" for key in ("mean_s", "p50_s", "p99_s")),
            f"{entry['gpu_seconds']:.1f}",
            *(f"{100 * entry[key]:.1f}" for key in ("idle", "padding")),
            f"{entry['dispatch_ms']:.1f}",
        )
    return table


def _csv(runs: list[Simulation]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["name", "step", "step_time_s", "gpu_seconds", "tokens", "padded_tokens"])
    for run in runs:
        for step, time_s in enumerate(run.step_time_s.tolist()):
            writer.writerow(
                [
                    run.name,
                    step,
                    f"{time_s:.6f}",
                    f"{time_s * run.num_gpus:.6f}",
                    int(run.tokens[step]),
                    int(run.padded_tokens[step]),
                ]
            )
    return buffer.getvalue()
