"""What a run did, as a person wants to read it: plan, times, cost, losses, adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from lobra.common.errors import ConfigError
from lobra.report.run_plans import PlanPart, plan_parts
from lobra.trainer.checkpoint import list_checkpoints, step_folder
from lobra.trainer.metrics import METRICS_FILE, read_metrics
from lobra.trainer.run_config import RunConfig, read_run_config
from lobra.trainer.run_spec import ADAPTER_FOLDER, CONFIG_FILE

WARM_UP_STEPS = 1  # the first step also pays for lazy initialisation; left out of the medians
PARTS = {
    "dispatch_wait": "dispatch_wait_s",
    "prepare": "prepare_time_s",
    "replica_wait": "replica_wait_s",
    "reduce": "reduce_time_s",
    "optimizer": "optimizer_time_s",
}
POOR_PREDICTION = 2.0  # measured over predicted step time, or the other way round
EDGE_STEPS = 3  # losses before and after are means over this many steps


@dataclass(frozen=True)
class TaskSummary:
    """A task's mean loss over its first and last steps, how many it trained, and how it ended."""

    name: str
    steps: int
    sequences: int
    loss_before: float
    loss_after: float
    skipped: int
    ended: str


@dataclass(frozen=True)
class ReplicaSummary:
    """A replica's median seconds a step, computed and predicted, and what it did not compute.

    `idle_share` is the part of the plan's steps' time it waited, reduced or updated.
    """

    layout: str
    busy_s: float
    predicted_s: float
    idle_share: float
    padded_tokens: int


@dataclass(frozen=True)
class PlanSummary:
    """A plan the run has had: its steps (as in "steps 1-5"), median step time and replicas."""

    plan: str
    num_gpus: int
    span: str
    step_time_s: float
    replicas: tuple[ReplicaSummary, ...]


@dataclass(frozen=True)
class RunSummary:
    """The figures of a run's report. Times in seconds; shares are of rank 0's step time.

    `plans` are all the run has had, in order; times, shares and `num_gpus` are of the last one.
    `step_gpu_seconds` is what the steps took on all GPUs; `other_gpu_seconds` what validation and
    checkpoints took in between (not: starting, loading the model).
    """

    plans: tuple[PlanSummary, ...]
    num_gpus: int
    device: str
    steps: int
    step_time_s: float
    predicted_step_time_s: float
    dispatch_wait_share: float
    prepare_share: float
    replica_wait_share: float
    reduce_share: float
    optimizer_share: float
    memory_bytes: int
    step_gpu_seconds: float
    other_gpu_seconds: float
    padding_ratio: float
    tasks: tuple[TaskSummary, ...]
    planned: dict[str, Any]
    adapters: Path | None


def run_parts(folder: Path) -> list[PlanPart]:
    """Return the steps of a run, divided by the plan they ran under.

    Raises
    ------
    ConfigError
        The folder holds no run, or not a step of it.
    """
    return _read(folder)[1]


def _read(folder: Path) -> tuple[RunConfig, list[PlanPart]]:
    """Return a run's config.yaml and its steps."""
    for name in (CONFIG_FILE, METRICS_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: no {name} in it; give the folder of a run")
    config = read_run_config(folder)
    steps = read_metrics(folder)
    if not steps:
        raise ConfigError(f"{folder / METRICS_FILE}: the run has not finished a step yet")
    return config, plan_parts(config, steps)


def summarise(folder: Path) -> RunSummary:
    """Read a run's folder.

    Raises
    ------
    ConfigError
        The folder holds no run, or not a step of it.
    """
    config, parts = _read(folder)
    steps = [step for part in parts for step in part.steps]
    timed = _timed(parts[-1])
    return RunSummary(
        plans=tuple(_plan_summary(part) for part in parts),
        num_gpus=parts[-1].num_gpus,
        device=config.device,
        steps=len(steps),
        step_time_s=median(step["step_time_s"] for step in timed),
        predicted_step_time_s=median(step["predicted_step_time_s"] for step in timed),
        **{f"{part}_share": _share(timed, field) for part, field in PARTS.items()},
        memory_bytes=max(step["memory_bytes"] for step in steps),
        step_gpu_seconds=sum(step["gpu_seconds"] for step in steps),
        other_gpu_seconds=sum(_between_steps(step) for step in steps),
        padding_ratio=1
        - sum(step["tokens"] for step in steps) / sum(step["padded_tokens"] for step in steps),
        tasks=tuple(_task_summary(task.name, steps, task.num_steps) for task in config.tasks),
        planned=dict(config.plan_meta or {}),
        adapters=_find_adapters(folder),
    )


def _timed(part: PlanPart) -> tuple[dict[str, Any], ...]:
    """Return the steps of a plan that count for times."""
    return part.steps[WARM_UP_STEPS:] or part.steps


def _plan_summary(part: PlanPart) -> PlanSummary:
    timed = _timed(part)
    total_s = sum(step["step_time_s"] for step in timed)
    replicas = []
    for index, layout in enumerate(part.layouts):
        own = [step["replicas"][index] for step in timed]
        replicas.append(
            ReplicaSummary(
                layout=layout,
                busy_s=median(entry["busy_s"] for entry in own),
                predicted_s=median(entry["predicted_s"] for entry in own),
                idle_share=1 - sum(entry["busy_s"] for entry in own) / total_s,
                padded_tokens=sum(entry["padded_tokens"] for entry in own),
            )
        )
    step_time_s = median(step["step_time_s"] for step in timed)
    return PlanSummary(part.plan, part.num_gpus, part.span, step_time_s, tuple(replicas))


def _share(steps: Sequence[dict[str, Any]], field: str) -> float:
    """Return the share of the steps' time that a part took (0: metrics of an older version)."""
    return sum(step.get(field, 0.0) for step in steps) / sum(s["step_time_s"] for s in steps)


def _between_steps(step: dict[str, Any]) -> float:
    """Return the GPU-seconds of the validation and the checkpoint that followed a step."""
    seconds = step.get("validation_time_s", 0.0) + step.get("checkpoint_time_s", 0.0)
    return float(seconds * step["gpu_seconds"] / step["step_time_s"])


def _find_adapters(folder: Path) -> Path | None:
    """Return where the run's adapters lie: of the finished run, else of its last checkpoint."""
    if (folder / ADAPTER_FOLDER).is_dir():
        return folder / ADAPTER_FOLDER
    saved = list_checkpoints(folder)
    return step_folder(folder, saved[-1]) / ADAPTER_FOLDER if saved else None


def _task_summary(
    name: str, steps: list[dict[str, Any]], num_steps: int | None = None
) -> TaskSummary:
    own = [step["tasks"][name] for step in steps if name in step["tasks"]]
    losses = [e["loss"] for e in own if e["loss"] is not None] or [float("nan")]
    edge = max(1, min(EDGE_STEPS, len(losses) // 2))
    return TaskSummary(
        name=name,
        steps=len(own),
        sequences=sum(entry["sequences"] for entry in own),
        loss_before=sum(losses[:edge]) / edge,
        loss_after=sum(losses[-edge:]) / edge,
        skipped=sum(not entry["applied"] for entry in own),
        ended=_how_it_ended(name, steps, num_steps),
    )


def _how_it_ended(name: str, steps: list[dict[str, Any]], num_steps: int | None) -> str:
    """Return "done", when and why the task was stopped, or how far it came."""
    last = next((step for step in reversed(steps) if name in step["tasks"]), None)
    if last is None:
        return "not started"
    stopped = last["tasks"][name].get("stopped")
    if stopped:
        return f"stopped at step {last['step'] + 1}: {stopped.partition(';')[0]}"
    own_steps = last["tasks"][name].get("own_step", last["step"]) + 1
    if num_steps is None or own_steps >= num_steps:
        return "done"
    return f"step {own_steps} of {num_steps}"


def print_run_report(folder: Path, console: Console | None = None) -> None:
    """Print a run's report to standard output (or to `console`)."""
    summary = summarise(folder)
    console = console or Console()
    console.print(_overview(summary, folder))
    console.print(_task_table(summary))
    for plan in summary.plans:
        console.print(_replica_table(plan, len(summary.plans) > 1))
    if warning := _poor_prediction(summary):
        console.print(warning, style="yellow", soft_wrap=True)
    where = summary.adapters or "none saved yet"
    console.print(f"adapters (PEFT format): {where}", soft_wrap=True)


def _poor_prediction(summary: RunSummary) -> str | None:
    """Return a warning if steps took much more or less time than predicted."""
    measured, predicted = summary.step_time_s, summary.predicted_step_time_s
    if predicted <= 0 or 1 / POOR_PREDICTION <= measured / predicted <= POOR_PREDICTION:
        return None
    more = measured > predicted
    factor = measured / predicted if more else predicted / measured
    return (
        f"steps take {factor:.1f} times {'longer' if more else 'less'} than predicted: the time "
        f"profile does not fit this machine, and the plan may not either; measure it with "
        f"scripts/cost_model_benchmark.sh and plan anew"
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
            f"{plan.plan} on {plan.num_gpus} {unit}s"
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
    ]
    homogeneous = summary.planned.get("homogeneous") or {}
    if planned and homogeneous.get("step_time_s"):
        best = homogeneous["step_time_s"] * sum(
            group["tp"] * group["pp"] * group["replicas"] for group in homogeneous["plan"]
        )
        saved = 1 - planned * summary.num_gpus / best
        rows.append(
            (
                "against the best homogeneous plan",
                f"{planned * summary.num_gpus:.2f} against {best:.2f} "
                f"{unit}-seconds per step, both predicted: {saved:.1%} less "
                f"({describe_groups(homogeneous.get('plan', []))})",
            )
        )
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
        ("  adapters' gradient reduction", f"{summary.reduce_share:.1%}"),
        ("  optimiser and adapter exchange", f"{summary.optimizer_share:.1%}"),
        ("memory in use, largest rank", f"{summary.memory_bytes / 2**20:,.0f} MiB"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """Return a plan given as the contract's JSON list in LobRA's notation."""
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
