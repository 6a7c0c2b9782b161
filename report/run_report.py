"""What a run did, as a person wants to read it: plan, times, cost, losses, adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lobra.common.words import counted
from lobra.report.run_summary import PlanSummary, RunSummary, TaskSummary, summarise

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""))
POOR_PREDICTION = 2.0  # measured over predicted step time, or the other way round
FEW_STEPS = 5  # the first ones take longer than others: nothing follows from so few


def print_run_report(folder: Path, console: Console | None = None) -> None:
    """Print a run's report to standard output (or to `console`)."""
    summary = summarise(folder)
    console = console or Console()
    console.print(_overview(summary, folder))
    console.print(_task_table(summary))
    if validated := [task for task in summary.tasks if task.validation]:
        console.print(_validation_table(validated))
    for plan in summary.plans:
        console.print(_replica_table(plan, len(summary.plans) > 1))
    if warning := _poor_prediction(summary):
        console.print(warning, style="yellow", soft_wrap=True)
    _print_folders(summary, console)


def _print_folders(summary: RunSummary, console: Console) -> None:
    """Print where what was trained lies."""
    over, others = "adapters (PEFT format)", "adapters of tasks that are not over"
    own = Path()
    if summary.trains_model:
        over, others, own = (
            "the model, as transformers loads it",
            "the model",
            Path(summary.tasks[0].name),
        )
    if summary.adapters or not summary.unfinished:
        where = summary.adapters / own if summary.adapters else "none saved yet"
        console.print(f"{over}: {where}", soft_wrap=True)
    if summary.unfinished:
        console.print(f"{others}, as last saved: {summary.unfinished / own}", soft_wrap=True)


def _poor_prediction(summary: RunSummary) -> str | None:
    """Return a warning if steps took much more or less time than predicted."""
    measured, predicted = summary.step_time_s, summary.predicted_step_time_s
    if summary.steps < FEW_STEPS:
        return None
    if predicted <= 0 or 1 / POOR_PREDICTION <= measured / predicted <= POOR_PREDICTION:
        return None
    more = measured > predicted
    factor = measured / predicted if more else predicted / measured
    return (
        f"steps take {factor:.1f} times {'longer' if more else 'less'} than predicted: the time "
        f"profile does not fit this machine, and the plan may not either; measure it with "
        f"lobra profile time and plan anew"
    )


def _overview(summary: RunSummary, folder: Path) -> Table:
    table = Table(title=f"Run {folder}", show_header=False, title_justify="left")
    unit = "GPU" if summary.device == "cuda" else "CPU rank"
    planned = summary.planned.get("step_time_s")
    gpu_seconds = summary.step_time_s * summary.num_gpus
    several = len(summary.plans) > 1
    rows = [
        (
            f"plan {number}, {plan.span}" if several else "plan",
            f"{plan.plan} on {counted(plan.num_gpus, unit)}"
            + (f", {plan.step_time_s:.3f} s a step" if several else ""),
        )
        for number, plan in enumerate(summary.plans, start=1)
    ]
    if several:
        rows.append(("times and shares below", "of the last plan"))
    rows += [
        ("steps", str(summary.steps)),
        ("step time, measured", f"{summary.step_time_s:.3f} s (median)"),
        ("step time, predicted", f"{summary.predicted_step_time_s:.3f} s (median)"),
        (f"{unit}-seconds per step", f"{gpu_seconds:.2f} measured"),
        ("tokens a second", f"{summary.tokens_per_s:,.0f}, none of padding"),
    ]
    if summary.flops_per_s is not None:
        share = "" if summary.mfu is None else f", {summary.mfu:.1%} of its peak (MFU)"
        rows.append(("model's operations", f"{tera(summary.flops_per_s)}FLOP/s a {unit}{share}"))
    homogeneous = summary.planned.get("homogeneous") or {}
    if planned and homogeneous.get("step_time_s") and homogeneous.get("plan"):
        best = homogeneous["step_time_s"] * sum(
            group["tp"] * group["pp"] * group["replicas"] for group in homogeneous["plan"]
        )
        saved = 1 - planned * summary.num_gpus / best
        other = describe_groups(homogeneous["plan"])
        told = (
            f"{planned * summary.num_gpus:.2f} against {best:.2f} {unit}-seconds per step, both "
            f"predicted: {saved:.1%} less ({other})"
        )
        is_same = other == summary.plans[-1].plan
        rows.append(("against the best homogeneous plan", "the same plan" if is_same else told))
    rows += [
        (f"{unit}-seconds, all steps", f"{summary.step_gpu_seconds:.1f}"),
        (
            f"{unit}-seconds, with validation and checkpoints",
            f"{summary.step_gpu_seconds + summary.other_gpu_seconds:.1f}",
        ),
        ("padding", f"{summary.padding_ratio:.1%} of the tokens computed"),
        ("of rank 0's step time:", ""),
        ("  waiting for the dispatcher", f"{summary.dispatch_wait_share:.2%}"),
        ("  drawing the batch, building tensors", f"{summary.prepare_share:.1%}"),
        ("  waiting for slower replicas", f"{summary.replica_wait_share:.1%}"),
        ("  reduction of gradients", f"{summary.reduce_share:.1%}"),
        ("  optimiser and exchange of weights", f"{summary.optimizer_share:.1%}"),
        ("memory in use, largest rank", f"{summary.memory_bytes / 2**20:,.0f} MiB"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def tera(number: float) -> str:
    """Return a large number with three digits and the prefix of its unit."""
    factor, prefix = next(pair for pair in PREFIXES if number >= pair[0] or pair[0] == 1.0)
    return f"{number / factor:.3g} {prefix}"


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """Return a plan, given as `lobra plan --json` lists it, in LobRA's notation."""
    return " ".join(f"<{g['tp']},{g['pp']}>x{g['replicas']}" for g in groups) or "unknown"


def _task_table(summary: RunSummary) -> Table:
    table = Table(title="Tasks", title_justify="left")
    table.add_column("task", overflow="fold")
    for column in ("steps", "sequences", "loss before", "after", "skipped"):
        table.add_column(column, justify="right")
    table.add_column("ended", overflow="fold")
    for task in summary.tasks:
        table.add_row(
            task.name,
            str(task.steps),
            str(task.sequences),
            f"{task.loss_before:.3f}",
            f"{task.loss_after:.3f}",
            str(task.skipped),
            task.ended,
        )
    return table


def _validation_table(tasks: Sequence[TaskSummary]) -> Table:
    table = Table(title="Validation losses", title_justify="left")
    table.add_column("task", overflow="fold")
    for column in ("evaluations", "first", "last", "lowest", "after its step"):
        table.add_column(column, justify="right")
    for task in tasks:
        losses = [loss for _, loss in task.validation]
        step, lowest = min(task.validation, key=lambda pair: pair[1])
        shown = (f"{loss:.3f}" for loss in (losses[0], losses[-1], lowest))
        table.add_row(task.name, str(len(losses)), *shown, str(step))
    return table


def _replica_table(plan: PlanSummary, is_one_of_several: bool) -> Table:
    which = f" of {plan.plan}, {plan.span}" if is_one_of_several else ""
    table = Table(title=f"Replicas{which}", title_justify="left")
    for column in ("replica", "layout", "busy", "predicted", "idle", "tokens computed"):
        table.add_column(column, justify="right")
    for index, replica in enumerate(plan.replicas):
        table.add_row(
            str(index),
            replica.layout,
            f"{replica.busy_s:.3f} s",
            f"{replica.predicted_s:.3f} s",
            f"{replica.idle_share:.0%}",
            f"{replica.padded_tokens:,}",
        )
    return table
