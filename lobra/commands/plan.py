"""``deploy_strategy_plan`` and ``lobra plan``: choose which replicas to deploy."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lobra.cli import guarded
from lobra.commands.output import write_problem, written
from lobra.common.errors import ConfigError
from lobra.layout.plan import plan_path, save_plan
from lobra.planner.bucketed.roles import roles, saturation
from lobra.planner.deploy import (
    PATTERNS,
    Deployment,
    Options,
    as_json,
    deploy,
    plan_with_meta,
)
from lobra.planner.outcome import compared
from lobra.planner.sweep import Sizing, parse_range, sweep
from lobra.planner.workload import Workload, read_workload
from lobra.profiler.capacity import memory_profile_for
from lobra.profiler.cost_model import load_cost_model
from lobra.profiler.layer_fit import KINDS
from lobra.profiler.profiles import (
    adapter_elements_of,
    layout_problem_of,
)
from lobra.report.sweep_plot import plot, plot_problem
from lobra.tasks.config import load_trainer_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments (CONTRACT, "Python CLI")."""
    add = parser.add_argument
    add("--model", required=True, help="tiny, 7B, 13B, 32B, 70B or a model folder")
    add("--num-gpus", type=int, required=True, help="GPUs to plan for")
    add("--trainer-config", required=True, help="name or path of the tasks' configuration")
    add("--strategy-config", required=True, help="name or path of the plan file to write")
    add("--num-tasks", type=int, help="the first so many tasks only (default: all)")
    add("--num-buckets", type=int, default=16, help="the most buckets (default 16)")
    add("--max-seq-length", type=int, default=16384, help="tokens; longer sequences are cut")
    add("--pattern", help="EXACT (default), BALANCE, GROUP or PRUNE; or EXPR_DEPLOY_PATTERN")
    add("--proposal", help="on or off: only the layouts LobRA would propose")
    add("--bucket-plan", help="DYNAMIC (default) or STATIC; or BUCKET_PLAN")
    add("--time-profile", help="CSV tp,seq_len,mbs,time (default: exp_result/profile/...)")
    add("--memory-profile", help="CSV tp,pp,sp,max_tokens (default: exp_result/profile/...)")
    add("--lengths", help="JSON or folder of .npy with sequence lengths, instead of data sets")
    add("--data-dir", default="data", help="where the data sets are (default data)")
    add("--cost-model", choices=KINDS, default="fitted", help="which fit of the time profile")
    add("--gpus-per-node", type=int, default=8, help="GPUs of one node (default 8)")
    add("--time-limit", type=float, help="seconds the planner may take")
    add("--sweep-gpus", metavar="LOW:HIGH[:STEP]", help="plan for other numbers of GPUs as well")
    add("--seed", type=int, default=0, help="of the run that is planned for (default 0)")
    add("--plot", metavar="FILE", help="draw the sweep (.png, .pdf or .svg)")
    add("--dry-run", action="store_true", help="write no plan file")
    add("--json", action="store_true", help="print one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Plan, show and write; return the exit code.

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    console = Console(stderr=args.json)
    options = read_options(args, os.environ)
    gpus = parse_range(args.sweep_gpus) if args.sweep_gpus else []
    check_outputs(args)
    config = load_trainer_config(args.trainer_config, args.num_tasks)
    cost_model = load_cost_model(args.model, args.time_profile, args.cost_model)
    given = None if args.memory_profile is None else Path(args.memory_profile)
    memory, memory_notes = memory_profile_for(args.model, config.tasks, given)
    workload, labels = read_workload(
        config, args.model, args.lengths, args.data_dir, args.max_seq_length, args.seed
    )
    adapters = [(task.rank, task.target_modules) for task in config.tasks]
    cost_model = cost_model.for_training(labels, adapter_elements_of(args.model, adapters))

    def refused(tp: int, pp: int) -> str | None:
        return layout_problem_of(args.model, tp, pp)

    with console.status("planning ...") as status:
        deployment = deploy(
            workload,
            memory,
            cost_model,
            args.num_gpus,
            options,
            progress=lambda message: status.update(f"planning: {message}"),
            refused=refused,
        )
        sizings = sweep(workload, memory, cost_model, gpus, options, status.update, refused)
    note = saturation(deployment.problem, deployment.outcome)
    if notes := (*memory_notes, *([note] if note else ())):
        outcome = replace(deployment.outcome, notes=(*deployment.outcome.notes, *notes))
        deployment = replace(deployment, outcome=outcome)
    plan = plan_with_meta(deployment, args.model, memory, options.gpus_per_node)
    show(console, deployment, workload)
    if sizings:
        show_sweep(console, sizings)
    if args.dry_run:
        console.print(f"dry run: {plan_path(args.strategy_config)} not written")
    else:
        with written("--strategy-config", plan_path(args.strategy_config)):
            console.print(f"written: {save_plan(plan, args.strategy_config)}")
    if args.json:
        swept = {"sweep": [sizing.as_json() for sizing in sizings]} if gpus else {}
        print(json.dumps({**as_json(deployment), **swept}))
    if args.plot:
        with written("--plot", args.plot):
            plot(sizings, args.plot)
        console.print(f"drawn: {args.plot}")
    return 0


def check_outputs(args: argparse.Namespace) -> None:
    """See before the search that what it finds can be written.

    Raises
    ------
    ConfigError
        Naming every option whose file cannot be written, or that lacks another.
    """
    problems: list[str | None] = []
    if not args.dry_run:
        problems.append(write_problem("--strategy-config", plan_path(args.strategy_config)))
    if args.plot:
        problems.append(plot_problem(args.plot) or write_problem("--plot", args.plot))
        if not args.sweep_gpus:
            problems.append("--plot: there is nothing to draw without --sweep-gpus")
    found = [problem for problem in problems if problem]
    if found:
        raise ConfigError(found)


def read_options(args: argparse.Namespace, environment: Mapping[str, str]) -> Options:
    """Return the options from the arguments, else from the environment, else the defaults.

    Raises
    ------
    ConfigError
        Naming every unknown value.
    """
    problems: list[str] = []

    def choice(flag: str, value: str | None, variable: str, known: Sequence[str]) -> str | None:
        source, text = (flag, value) if value is not None else (variable, environment.get(variable))
        if text is None or text == "":
            return None
        if text.upper() not in known:
            problems.append(f"{source}: {text!r} is unknown; known are {', '.join(known)}")
        return text.upper()

    pattern = choice("--pattern", args.pattern, "EXPR_DEPLOY_PATTERN", tuple(PATTERNS)) or "EXACT"
    proposal = choice("--proposal", args.proposal, "EXPR_SCHEME_PROPOSAL", ("ON", "OFF"))
    buckets = choice("--bucket-plan", args.bucket_plan, "BUCKET_PLAN", ("DYNAMIC", "STATIC"))
    if args.num_gpus < 1:
        problems.append(f"--num-gpus: {args.num_gpus}; a plan needs at least one GPU")
    if args.gpus_per_node < 1:
        problems.append(f"--gpus-per-node: {args.gpus_per_node}; a node has at least one GPU")
    if args.seed < 0:
        problems.append(f"--seed: {args.seed}; a number from 0 on is needed")
    if args.num_buckets < 1:
        problems.append(f"--num-buckets: {args.num_buckets}; at least one bucket is needed")
    if args.max_seq_length < 1:
        problems.append(f"--max-seq-length: {args.max_seq_length}; at least 1 token is needed")
    if args.time_limit is not None and not (args.time_limit > 0 and math.isfinite(args.time_limit)):
        problems.append(f"--time-limit: {args.time_limit}; a positive number of seconds is needed")
    if problems:
        raise ConfigError(problems)
    return Options(
        pattern=pattern,
        proposal=pattern != "EXACT" if proposal is None else proposal == "ON",
        static_buckets=buckets == "STATIC",
        num_buckets=args.num_buckets,
        gpus_per_node=args.gpus_per_node,
        time_limit_s=args.time_limit,
    )


def show(console: Console, deployment: Deployment, workload: Workload) -> None:
    """Print the plan for a person."""
    outcome, same = deployment.outcome, deployment.homogeneous
    table = Table(title=f"plan by {outcome.planner} in {outcome.planner_time_s:.2f} s")
    for column in ("layout", "replicas", "GPUs", "max tokens", "takes", "of all"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("why")
    for role in roles(deployment.problem, outcome.plan):
        group = role.group
        table.add_row(
            str(group.layout),
            str(group.replicas),
            str(group.num_gpus),
            str(group.max_tokens),
            f"{role.shortest}-{role.longest}" if role.longest else "-",
            f"{role.tokens_share:.0%}",
            role.reason,
        )
    console.print(table)
    figures = Table(show_header=False)
    figures.add_row("GPUs used", f"{outcome.plan.num_gpus} of {deployment.problem.num_gpus}")
    figures.add_row("predicted step time", f"{outcome.step_time_s:.4g} s")
    if deployment.sync_time_s:
        figures.add_row("adapter synchronisation", f"{deployment.sync_time_s:.4g} s after that")
    figures.add_row("GPU-seconds per step", f"{outcome.gpu_seconds:.4g}")
    if outcome.lower_bound_s > 0:
        figures.add_row("certified lower bound", f"{outcome.lower_bound_s:.4g} s")
        figures.add_row("gap", f"{100 * outcome.gap:.2f} %")
    if outcome.objective_s is not None:
        figures.add_row("its own objective", f"{outcome.objective_s:.4g} s")
    if same is not None:
        figures.add_row("best homogeneous plan", compared(outcome, same))
    for entry in deployment.sampled:
        figures.add_row(
            f"{len(entry.step_time_s)} sampled steps",
            f"mean {entry.mean_s:.4g} s, p50 {entry.percentile_s(50):.4g} s, "
            f"p99 {entry.percentile_s(99):.4g} s: {entry.plan}",
        )
    figures.add_row("buckets", " ".join(str(bucket) for bucket in deployment.batch.buckets))
    figures.add_row("padding", f"{100 * deployment.batch.padding_ratio:.2f} % of padded tokens")
    console.print(figures)
    for note in outcome.notes:
        console.print(f"note: {note}")
    for task, number in workload.clipped.items():
        if number:
            total = len(workload.lengths[task]) + len(workload.held_out[task])
            console.print(f"note: task {task}: {number} of {total} sequences are cut to its limit")
    for reason in deployment.candidates.dropped:
        console.print(f"left out: {reason}")


def show_sweep(console: Console, sizings: Sequence[Sizing]) -> None:
    """Print what other numbers of GPUs would give."""
    table = Table(title="other numbers of GPUs")
    for column in ("GPUs", "step s", "gap %", "GPU-seconds", "homogeneous s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("plan")
    for sizing in sizings:
        found = sizing.deployment
        if found is None:
            table.add_row(str(sizing.num_gpus), "-", "-", "-", "-", "none, see below")
            continue
        outcome, same = found.outcome, found.homogeneous
        table.add_row(
            str(sizing.num_gpus),
            f"{outcome.step_time_s:.3f}",
            f"{100 * outcome.gap:.2f}",
            f"{outcome.gpu_seconds:.1f}",
            f"{same.step_time_s:.3f}" if same else "-",
            str(outcome.plan),
        )
    console.print(table)
    for sizing in sizings:
        if sizing.deployment is None:
            console.print(f"{sizing.num_gpus} GPUs: {sizing.reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``deploy_strategy_plan`` and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="deploy_strategy_plan", description="Choose which replicas of which layouts to deploy."
    )
    add_arguments(parser)
    return guarded(lambda: run(parser.parse_args(argv)), "deploy_strategy_plan")


if __name__ == "__main__":
    sys.exit(main())
