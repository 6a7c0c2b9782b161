"""``deploy_strategy_plan`` and ``lobra plan``: choose which replicas to deploy."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, get_args

from rich.console import Console
from rich.table import Table

from lobra.cli import guarded, make_app, run
from lobra.commands.output import write_problem, written
from lobra.commands.plan_sweeps import (
    NO_SWEEP,
    SweepOptions,
    Sweeps,
    read_hardware,
    show_sweep,
    sweeps_of,
)
from lobra.commands.planning import PlanningOptions, progress_on
from lobra.common.errors import Problems
from lobra.common.options import (
    ANY_CASE,
    NumGpus,
    PositiveNumber,
    Switch,
    as_options,
    from_environment,
    within_bounds,
)
from lobra.layout.plan import plan_path, save_plan
from lobra.layout.sequences import Batching
from lobra.planner.deploy import deploy
from lobra.planner.deployment import Deployment, Options, as_json, plan_with_meta
from lobra.planner.outcome import compared
from lobra.planner.sweep import sweep
from lobra.planner.workload import Workload
from lobra.report.sweep_plot import plot

Pattern = Literal["EXACT", "BALANCE", "GROUP", "PRUNE"]
BucketPlan = Literal["DYNAMIC", "STATIC"]
PATTERNS: Mapping[str, Pattern] = {name: name for name in get_args(Pattern)}
PROPOSALS: Mapping[str, Switch] = {"ON": "on", "OFF": "off"}
BUCKET_PLANS: Mapping[str, BucketPlan] = {name: name for name in get_args(BucketPlan)}


@as_options
@dataclass(frozen=True, kw_only=True)
class PlanOptions(PlanningOptions):
    """What is planned for, and how.

    Parameters
    ----------
    num_gpus
        GPUs to plan for.
    pattern
        The planner; by default EXPR_DEPLOY_PATTERN, else EXACT.
    batching
        How training is to fill micro-batches; by default packed with EXACT, bucketed with the
        others, which plan no other, and with LobRA's fit, which is of padded rows.
    proposal
        Only the layouts LobRA would propose; by default EXPR_SCHEME_PROPOSAL, else off with EXACT,
        on with the others.
    bucket_plan
        By default BUCKET_PLAN, else DYNAMIC.
    time_limit
        Seconds the planner may take; it then gives its best plan so far. By default 60, EXACT 4 to
        35 of processor time by the number of GPUs.
    dry_run
        Write no plan file.
    verbose
        Show also the expected batch, the bound, and every plan that was simulated.
    """

    num_gpus: NumGpus
    pattern: Annotated[Pattern | None, ANY_CASE] = None
    batching: Batching | None = None
    proposal: Annotated[Switch | None, ANY_CASE] = None
    bucket_plan: Annotated[BucketPlan | None, ANY_CASE] = None
    time_limit: PositiveNumber | None = None
    dry_run: bool = False
    verbose: bool = False


def plan(*, options: PlanOptions, sweeping: SweepOptions = NO_SWEEP) -> int:
    """Choose which replicas of which layouts to deploy, and write the plan file.

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    console = Console(stderr=options.json)
    options, problems = within_bounds(options)
    how = deploy_options(options, os.environ, problems)
    sweeps = Sweeps(())
    with problems.noted():
        sweeps = sweeps_of(sweeping, options, options.num_gpus)
    workload, own, hardware, notes = read_hardware(sweeps, options, options.num_gpus, problems)
    memory, cost_model = own.memory, own.cost_model
    with console.status("planning ...") as status:
        deployment = deploy(
            workload,
            memory,
            cost_model,
            options.num_gpus,
            how,
            progress=progress_on(console, status),
            refused=options.layout_problem,
        )
        sizings = []
        if sweeps.is_asked:
            sizings = sweep(
                workload, hardware, sweeps.gpus, sweeps.contexts, how, status.update,
                options.layout_problem,
            )  # fmt: skip
    outcome = deployment.outcome.noted(*notes, needless_buckets(options, how))
    deployment = replace(deployment, outcome=outcome)
    chosen = plan_with_meta(deployment, options.model, memory, how.gpus_per_node)
    show(console, deployment, workload, options.verbose)
    if sizings:
        show_sweep(console, sizings)
    if options.dry_run:
        console.print(f"dry run: {plan_path(options.strategy_config)} not written")
    else:
        with written("--strategy-config", plan_path(options.strategy_config)):
            is_there = plan_path(options.strategy_config).exists()
            path = save_plan(chosen, options.strategy_config)
            console.print(
                f"{'written, in place of an earlier one' if is_there else 'written'}: {path}"
            )
    if options.json:
        swept = {"sweep": [sizing.as_json() for sizing in sizings]} if sizings else {}
        print(json.dumps({**as_json(deployment), **swept}))
    if sweeping.plot:
        with written("--plot", sweeping.plot):
            plot(sizings, sweeping.plot)
        console.print(f"drawn: {sweeping.plot}")
    return 0


def output_problems(options: PlanOptions) -> Problems:
    """Return, before the search, why what it finds could not be written."""
    problems: list[str | None] = []
    if not options.dry_run:
        problems.append(write_problem("--strategy-config", plan_path(options.strategy_config)))
    return Problems(filter(None, problems))


def deploy_options(
    options: PlanOptions, environment: Mapping[str, str], problems: Problems
) -> Options:
    """Return how to plan, from the options, else from the environment, else the defaults.

    Unknown values and outputs that cannot be written are added to ``problems``.
    """
    problems += output_problems(options)
    pattern = from_environment("EXPR_DEPLOY_PATTERN", PATTERNS, environment, problems)
    proposal = from_environment("EXPR_SCHEME_PROPOSAL", PROPOSALS, environment, problems)
    bucket_plan = from_environment("BUCKET_PLAN", BUCKET_PLANS, environment, problems)
    pattern = options.pattern or pattern or "EXACT"
    proposal = options.proposal or proposal or ("off" if pattern == "EXACT" else "on")
    if options.batching == "packed" and pattern != "EXACT":
        problems.add(
            f"--batching packed: {pattern} plans padded buckets only; leave the option out, or "
            f"plan with --pattern EXACT"
        )
    if options.batching == "packed" and options.cost_model == "lobra6":
        problems.add(
            "--batching packed: --cost-model lobra6 is LobRA's fit of padded rows; leave one out"
        )
    packs = pattern == "EXACT" and options.cost_model != "lobra6"
    return Options(
        pattern=pattern,
        batching=options.batching or ("packed" if packs else "bucketed"),
        proposal=proposal == "on",
        static_buckets=(options.bucket_plan or bucket_plan) == "STATIC",
        num_buckets=options.num_buckets,
        gpus_per_node=options.gpus_per_node,
        time_limit_s=options.time_limit,
    )


def needless_buckets(options: PlanOptions, how: Options) -> str | None:
    """Return a note on options about buckets that packed micro-batches have no use for."""
    if how.batching == "bucketed":
        return None
    chosen = options.num_buckets != PlanOptions.num_buckets
    given = [
        *(["--num-buckets"] if chosen else []),
        *(["--bucket-plan"] if options.bucket_plan else []),
    ]
    if not given:
        return None
    return f"{' and '.join(given)}: packed micro-batches have no buckets (--batching bucketed has)"


def show(
    console: Console, deployment: Deployment, workload: Workload, verbose: bool = False
) -> None:
    """Print the plan for a person."""
    outcome, same, sampled = deployment.outcome, deployment.homogeneous, deployment.sampled
    table = Table(title=f"plan by {outcome.planner} in {outcome.planner_time_s:.2f} s")
    for column in ("layout", "replicas", "GPUs", "max tokens", "takes", "of all"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("why")
    for role in deployment.roles:
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
    summary = Table(show_header=False)
    summary.add_row("GPUs used", f"{outcome.plan.num_gpus} of {deployment.problem.num_gpus}")
    summary.add_row("micro-batches", deployment.batching)
    summary.add_row(
        "step time", f"{sampled.mean_step_time_s:.4g} s, mean of {sampled.steps} sampled steps"
    )
    summary.add_row("GPU-seconds per step", f"{sampled.mean_gpu_seconds:.4g}")
    summary.add_row(
        "any other plan", f"at most {sampled.gap:.1%} faster on average over these steps"
    )
    if same is not None:
        both = deployment.with_sync(outcome), deployment.with_sync(same)
        summary.add_row("best homogeneous plan", compared(*both))
    if verbose:
        _add_details(summary, deployment)
    console.print(summary)
    for note in outcome.notes:
        console.print(f"note: {note}")
    for task, number in workload.clipped.items():
        if number:
            total = len(workload.lengths[task]) + len(workload.held_out[task])
            console.print(f"note: task {task}: {number} of {total} sequences are cut to its limit")
    if dropped := deployment.candidates.dropped:
        console.print(f"left out: {by_reason(dropped)}", soft_wrap=True, highlight=False)


def by_reason(dropped: Sequence[str]) -> str:
    """Return in one line why layouts were left out, each reason once: given "layout: reason"."""
    layouts: dict[str, list[str]] = {}
    for entry in dropped:
        layout, _, reason = entry.partition(": ")
        layouts.setdefault(reason, []).append(layout)
    return "; ".join(f"{' '.join(own)} ({reason})" for reason, own in layouts.items())


def _add_details(summary: Table, deployment: Deployment) -> None:
    """Add what is known of the expected batch, and of every plan that was simulated."""
    outcome = deployment.outcome
    if deployment.batching == "bucketed":
        summary.add_row("expected batch", f"{outcome.step_time_s:.4g} s")
        summary.add_row("certified lower bound", f"{outcome.lower_bound_s:.4g} s for that batch")
        summary.add_row("gap", f"{100 * outcome.gap:.2f} %")
        summary.add_row("buckets", " ".join(map(str, deployment.buckets)))
    else:
        summary.add_row("certified lower bound", f"{outcome.lower_bound_s:.4g} s on average")
    summary.add_row("padding", f"{100 * deployment.padding_ratio:.2f} % of padded tokens")
    if deployment.sync_time_s:
        summary.add_row("adapter synchronisation", f"{deployment.sync_time_s:.4g} s of each step")
    if outcome.objective_s is not None:
        summary.add_row("its own objective", f"{outcome.objective_s:.4g} s")
    for entry in deployment.compared:
        summary.add_row(
            f"{len(entry.step_time_s)} sampled steps",
            f"mean {entry.mean_s:.4g} s, p50 {entry.percentile_s(50):.4g} s, "
            f"p99 {entry.percentile_s(99):.4g} s: {entry.plan}",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``deploy_strategy_plan`` and return its exit code."""
    app = make_app(name="deploy_strategy_plan", default_command=plan, version_flags=())
    return guarded(lambda: run(app, sys.argv[1:] if argv is None else argv), app.name[0])


if __name__ == "__main__":
    sys.exit(main())
