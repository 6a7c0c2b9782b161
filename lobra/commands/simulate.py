"""``lobra simulate``: steps of a plan under the cost model, without GPUs."""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lobra.commands.output import write_problem, written
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.layout.plan import load_plan
from lobra.layout.trace import TRACE_FILE, trace_text
from lobra.planner.baselines import baselines, ladder
from lobra.planner.candidates import all_candidates
from lobra.planner.dispatch import dispatch
from lobra.planner.simulate import Simulation
from lobra.planner.timeline import timeline
from lobra.planner.workload import read_workload
from lobra.profiler.capacity import memory_profile_for
from lobra.profiler.cost_model import load_cost_model
from lobra.profiler.layer_fit import KINDS
from lobra.profiler.profiles import (
    adapter_elements_of,
    default_memory_path,
    layout_problem_of,
)
from lobra.tasks.config import load_trainer_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``lobra simulate``."""
    add = parser.add_argument
    add("--model", required=True, help="tiny, 7B, 13B, 32B, 70B or a model folder")
    add("--trainer-config", required=True, help="name or path of the tasks' configuration")
    add("--strategy-config", required=True, help="name or path of the plan")
    add("--num-tasks", type=int, help="the first so many tasks only (default: all)")
    add(
        "--steps",
        type=int,
        default=20,
        help="steps to simulate, as long as a task runs (default 20)",
    )
    add("--seed", type=int, default=0, help="of the run whose steps they are (default 0)")
    add("--num-buckets", type=int, default=16, help="the most buckets of a step (default 16)")
    add("--max-seq-length", type=int, default=16384, help="tokens; longer sequences are cut")
    add("--time-profile", help="CSV tp,seq_len,mbs,time (default: exp_result/profile/...)")
    add("--memory-profile", help="CSV tp,pp,sp,max_tokens, for the homogeneous baselines")
    add("--lengths", help="JSON or folder of .npy with sequence lengths, instead of data sets")
    add("--data-dir", default="data", help="where the data sets are (default data)")
    add("--cost-model", choices=KINDS, default="fitted", help="which fit of the time profile")
    add("--gpus-per-node", type=int, default=8, help="GPUs of one node (default 8)")
    add("--no-baselines", action="store_true", help="only the plan itself")
    add("--output-dir", help="write simulation.json, steps.csv and trace.json there")
    add("--json", action="store_true", help="print one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Simulate, show and write; return the exit code.

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    check_arguments(args)
    console = Console(stderr=args.json)
    config = load_trainer_config(args.trainer_config, args.num_tasks)
    plan = load_plan(args.strategy_config)
    cost_model = load_cost_model(args.model, args.time_profile, args.cost_model)
    workload, labels = read_workload(
        config, args.model, args.lengths, args.data_dir, args.max_seq_length, args.seed
    )
    adapters = [(task.rank, task.target_modules) for task in config.tasks]
    cost_model = cost_model.for_training(labels, adapter_elements_of(args.model, adapters))
    with console.status("simulating ..."):
        runs: list[Simulation] = []
        left_out: list[str] = []
        if not args.no_baselines:
            memory_path = args.memory_profile or default_memory_path(args.model, len(config.tasks))
            if args.memory_profile or Path(memory_path).is_file():
                memory, notes = memory_profile_for(args.model, config.tasks, Path(memory_path))
                for note in notes:
                    console.print(f"note: {note}")
                candidates = all_candidates(
                    memory,
                    cost_model,
                    plan.num_gpus,
                    workload.longest,
                    args.gpus_per_node,
                    lambda tp, pp: layout_problem_of(args.model, tp, pp),
                )
                runs, left_out = baselines(
                    workload,
                    candidates.chosen,
                    cost_model,
                    plan.num_gpus,
                    args.steps,
                    gpus_per_node=args.gpus_per_node,
                )
            else:
                left_out = [
                    f"Task-Sequential and Task-Fused: no memory profile at {memory_path}; give "
                    f"--memory-profile"
                ]
        rungs, others = ladder(plan, workload, cost_model, args.steps, num_buckets=args.num_buckets)
        runs += rungs[-1:] if args.no_baselines else rungs
        left_out += [] if args.no_baselines else others
    summaries = [run.summary() for run in runs]
    console.print(_table(summaries))
    for entry in summaries:
        console.print(f"{entry['name']}: {entry['plan']}")
    for reason in left_out:
        console.print(f"left out: {reason}", soft_wrap=True)
    if args.output_dir:
        first = next(workload.steps(1))
        assignment = dispatch(first, plan, cost_model, num_buckets=args.num_buckets)
        folder = Path(args.output_dir)
        trace = trace_text(timeline(assignment, plan, cost_model))
        with written("--output-dir", folder):
            write_atomic(folder / "steps.csv", _csv(runs))
            write_atomic(folder / TRACE_FILE, trace)
            write_atomic(folder / "simulation.json", json.dumps(summaries, indent=2) + "\n")
        console.print(f"written: {folder}/simulation.json, steps.csv, {TRACE_FILE}")
    if args.json:
        print(json.dumps({"plan": str(plan), "runs": summaries, "left_out": left_out}))
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """See that every number is possible and the output folder can be written.

    Raises
    ------
    ConfigError
        Naming every mistake.
    """
    problems: list[str] = []
    for name, least, what in (
        ("steps", 1, "at least one step is needed"),
        ("seed", 0, "a number from 0 on is needed"),
        ("num_tasks", 1, "at least one task is needed"),
        ("num_buckets", 1, "at least one bucket is needed"),
        ("max_seq_length", 1, "at least 1 token is needed"),
        ("gpus_per_node", 1, "a node has at least one GPU"),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            problems.append(f"--{name.replace('_', '-')}: {value}; {what}")
    if args.output_dir:
        problem = write_problem("--output-dir", Path(args.output_dir) / "simulation.json")
        problems += [problem] if problem else []
    if problems:
        raise ConfigError(problems)


def _table(summaries: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{summaries[0]['steps']} simulated steps (ms: to dispatch one)")
    table.add_column("what")
    for column in ("mean s", "p50 s", "p99 s", "GPU-s", "idle%", "pad%", "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in summaries:
        table.add_row(
            entry["name"],
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
