"""The tasks of a run as they are now, and the run that has just these."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lobra.common.errors import ConfigError, Problems
from lobra.common.models import read_as
from lobra.layout.plan import Plan
from lobra.layout.shapes import ModelShape
from lobra.planner.workload import token_shares
from lobra.profiler.cost_model import CostModel
from lobra.profiler.estimate_memory import layer_weights
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.tasks.task_file import TrainerConfig
from lobra.trainer.admission import base_shape, plan_beside
from lobra.trainer.checkpoint import CheckpointState
from lobra.trainer.checkpoint_folder import FOLDER, STATE_FILE
from lobra.trainer.run_spec import Admission, RunSpec
from lobra.trainer.task_progress import RunTask, TaskProgress
from lobra.trainer.task_requests import TaskChange, left_by


def starting_tasks(run: RunSpec) -> list[RunTask]:
    """Return the tasks of a run as they start."""
    return [
        RunTask(
            task, TokenizedDataset.load(run.data_folder(task.name)), TaskProgress(steps), record
        )
        for task, steps, record in zip(run.tasks, run.num_steps, run.task_records, strict=True)
    ]


def with_tasks(run: RunSpec, tasks: Sequence[RunTask], step: int) -> RunSpec:
    """Return a run that has these tasks after ``step`` steps.

    Its steps are predicted anew, its micro-batches are as large as fits beside the tasks' adapters,
    and it is as long as the tasks need.
    """
    configs = tuple(task.config for task in tasks)
    end = max([run.last_step, *(step + task.progress.steps_left for task in tasks)])
    return replace(
        run,
        tasks=configs,
        num_steps=tuple(task.progress.num_steps for task in tasks),
        task_records=tuple(task.record for task in tasks),
        plan=fitting_plan(run, configs),
        last_step=end if run.max_steps is None else min(end, run.max_steps),
        cost_model=training_costs(
            run.cost_model, base_shape(run), configs, [task.data for task in tasks]
        ),
        validate_every=run.validate_every or evaluation_period(configs, run.admission),
    )


def fitting_plan(run: RunSpec, tasks: Sequence[TaskConfig]) -> Plan:
    """Return the run's plan with micro-batches that fit beside the adapters of the tasks it has.

    Where the memory profile is not of such tasks they are as they were.
    """
    with suppress(ConfigError):
        return plan_beside(run, tasks)[0]
    return run.plan


def training_costs(
    cost_model: CostModel,
    shape: ModelShape,
    tasks: Sequence[TaskConfig],
    training: Sequence[TokenizedDataset],
) -> CostModel:
    """Return the cost model of steps of these tasks, given with what they train on."""
    elements = sum(
        shape.num_layers * layer_weights(shape)
        if task.trains_model
        else shape.adapter_elements(task.largest_rank, task.target_modules)
        for task in tasks
    )
    return cost_model.for_training(token_shares(tasks, training), elements)


def evaluation_period(tasks: Sequence[TaskConfig], admission: Admission | None) -> int:
    """Return the steps of an evaluation period; 0: no task wants one, or none may be begun."""
    wanted = any(task.validation_split or task.early_stopping_patience for task in tasks)
    return admission.validate_every if admission is not None and wanted else 0


def joined_tasks(changes: Sequence[TaskChange]) -> tuple[TaskConfig, ...]:
    """Return the tasks that have joined by these changes and have not left."""
    fields = {change.request.name: change.request.task for change in changes}
    found = (read_as(TaskConfig, own, Problems()) for own in fields.values() if own is not None)
    return tuple(task for task in found if task is not None)


def present_tasks(
    config: TrainerConfig, state: CheckpointState | None, is_watched: bool
) -> list[TrainerConfig]:
    """Return the tasks a run has where it starts: those of its file, and those that have joined.

    A task that has left is none of them, whatever the file says. If the file is watched, what it
    has more than the checkpoint joins later.

    Raises
    ------
    ConfigError
        If every task has left.
    """
    if state is None:
        return [config]
    left, joined = left_by(state.changes), joined_tasks(state.changes)
    listed = [
        (number, task)
        for number, task in zip(config.numbers, config.tasks, strict=True)
        if task.name not in left and (task.name in state.progress or not is_watched)
    ]
    own = {task.name for _, task in listed}
    others = tuple(task for task in joined if task.name not in own)
    if not listed and not others:
        raise ConfigError(f"--resume: every task has left the run after step {state.step}")
    where = Path(FOLDER, f"step_{state.step}", STATE_FILE)
    return [
        replace(
            config,
            tasks=tuple(task for _, task in listed),
            numbers=tuple(number for number, _ in listed),
        ),
        TrainerConfig("joined", config.variant, others, where, tuple(range(len(others)))),
    ]


def tasks_at(run: RunSpec, state: CheckpointState) -> list[RunTask]:
    """Return the tasks that a run had at a checkpoint, as it has them."""
    configs = {task.name: task for task in (*run.tasks, *joined_tasks(state.changes))}
    return [
        RunTask(
            configs[record["name"]],
            TokenizedDataset.load(run.data_folder(record["name"])),
            state.progress[record["name"]],
            record,
        )
        for record in state.tasks
    ]


def at_checkpoint(run: RunSpec, state: CheckpointState) -> RunSpec:
    """Return the run with the tasks that it had at a checkpoint, where these have changed."""
    same = {task.name for task in run.tasks} == state.progress.keys()
    return run if same and not state.changes else with_tasks(run, tasks_at(run, state), state.step)
