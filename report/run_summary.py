"""What a run did, in numbers: of its plans, replicas and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lobra.common.errors import ConfigError
from lobra.report.run_plans import PlanPart, plan_parts
from lobra.trainer.checkpoint_folder import list_checkpoints, step_folder
from lobra.trainer.log_parts import METRICS_FILE, log_files
from lobra.trainer.metrics import read_metrics
from lobra.trainer.run_config import RunConfig, read_run_config
from lobra.trainer.run_spec import ADAPTER_FOLDER

WARM_UP_STEPS = 1  # the first step also pays for lazy initialisation; left out of the medians
EDGE_STEPS = 3  # losses before and after are means over this many steps
PARTS = {
    "dispatch_wait": "dispatch_wait_s",
    "prepare": "prepare_time_s",
    "replica_wait": "replica_wait_s",
    "reduce": "reduce_time_s",
    "optimizer": "optimizer_time_s",
}


@dataclass(frozen=True)
class TaskSummary:
    """A task's mean loss over its first and last steps, how many it trained, and how it ended.

    `validation` are its own steps that were evaluated, counted from 1, with their losses.
    """

    name: str
    steps: int
    sequences: int
    loss_before: float
    loss_after: float
    skipped: int
    ended: str
    validation: tuple[tuple[int, float], ...] = ()


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
    """A run in numbers. Times in seconds; shares are of rank 0's step time.

    `plans` are all the run has had, in order; times, shares and `num_gpus` are of the last one.
    `step_gpu_seconds` is what the steps took on all GPUs; `other_gpu_seconds` what validation and
    checkpoints took in between (not: starting, loading the model). `flops_per_s` are of one GPU,
    `mfu` is their share of its peak; None where metrics do not say. `adapters` is where adapters of
    tasks that are over lie, `unfinished` where those of the others do, in the last checkpoint; if
    the run `trains_model`, that is what lies there.
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
    tokens_per_s: float
    flops_per_s: float | None
    mfu: float | None
    step_gpu_seconds: float
    other_gpu_seconds: float
    padding_ratio: float
    tasks: tuple[TaskSummary, ...]
    planned: dict[str, Any]
    trains_model: bool
    adapters: Path | None
    unfinished: Path | None


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
    config = read_run_config(folder)
    if not log_files(folder):
        raise ConfigError(f"{folder}: no {METRICS_FILE} in it; give the folder of a run")
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
    exported, saved = folder / ADAPTER_FOLDER, _last_saved(folder)
    missing = [task.name for task in config.tasks if not (exported / task.name).is_dir()]
    return RunSummary(
        plans=tuple(_plan_summary(part) for part in parts),
        num_gpus=parts[-1].num_gpus,
        device=config.device,
        steps=len(steps),
        step_time_s=median(step["step_time_s"] for step in timed),
        predicted_step_time_s=median(step["predicted_step_time_s"] for step in timed),
        **{f"{part}_share": _share(timed, field) for part, field in PARTS.items()},
        memory_bytes=max(step["memory_bytes"] for step in steps),
        tokens_per_s=sum(step["tokens"] for step in timed) / sum(s["step_time_s"] for s in timed),
        flops_per_s=_flops_per_s(timed),
        mfu=_mean_mfu(timed),
        step_gpu_seconds=sum(step["gpu_seconds"] for step in steps),
        other_gpu_seconds=sum(_between_steps(step) for step in steps),
        padding_ratio=1
        - sum(step["tokens"] for step in steps) / sum(step["padded_tokens"] for step in steps),
        tasks=tuple(
            task_summary(task.name, steps, task.num_steps, task.left_at is not None)
            for task in config.tasks
        ),
        planned=dict(config.plan_meta or {}),
        trains_model=config.trains_model,
        adapters=exported if exported.is_dir() else None,
        unfinished=saved if saved is not None and missing else None,
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


def _flops_per_s(steps: Sequence[dict[str, Any]]) -> float | None:
    """Return the model's operations a second and GPU (None: metrics of an older version)."""
    known = [step for step in steps if step.get("flops")]
    gpu_seconds = sum(step["gpu_seconds"] for step in known)
    return sum(step["flops"] for step in known) / gpu_seconds if known else None


def _mean_mfu(steps: Sequence[dict[str, Any]]) -> float | None:
    """Return the mean MFU, each step with the weight of its time."""
    known = [step for step in steps if step.get("mfu") is not None]
    time_s = sum(step["step_time_s"] for step in known)
    return sum(step["mfu"] * step["step_time_s"] for step in known) / time_s if known else None


def _between_steps(step: dict[str, Any]) -> float:
    """Return the GPU-seconds of the validation and the checkpoint that followed a step."""
    seconds = step.get("validation_time_s", 0.0) + step.get("checkpoint_time_s", 0.0)
    return float(seconds * step["gpu_seconds"] / step["step_time_s"])


def _last_saved(folder: Path) -> Path | None:
    """Return where the adapters of the last checkpoint lie."""
    saved = list_checkpoints(folder)
    return step_folder(folder, saved[-1]) / ADAPTER_FOLDER if saved else None


def task_summary(
    name: str, steps: list[dict[str, Any]], num_steps: int | None = None, has_left: bool = False
) -> TaskSummary:
    """Return what became of a task in these steps, of so many that it was to make itself.

    ``has_left``: it has left the run.
    """
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
        ended=_how_it_ended(name, steps, num_steps, has_left),
        validation=tuple(
            (entry["own_step"] + 1, entry["validation_loss"])
            for entry in own
            if "own_step" in entry and entry.get("validation_loss") is not None
        ),
    )


def _how_it_ended(
    name: str, steps: list[dict[str, Any]], num_steps: int | None, has_left: bool
) -> str:
    """Return "done", when and why the task was stopped, or how far it came."""
    last = next((step for step in reversed(steps) if name in step["tasks"]), None)
    if last is None:
        return "cancelled before its first step" if has_left else "not started"
    stopped = last["tasks"][name].get("stopped")
    if stopped:
        return f"stopped at step {last['step'] + 1}: {stopped.partition(';')[0]}"
    own_steps = last["tasks"][name].get("own_step", last["step"]) + 1
    if num_steps is None or own_steps >= num_steps:
        return "done"
    return f"{'cancelled after ' if has_left else ''}step {own_steps} of {num_steps}"
