"""The tasks that a run trains: those whose data can be read, what they train on and hold out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from typing import Any

from lobra.common.errors import Problems
from lobra.layout.sequences import Batching
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset, split
from lobra.tasks.sampling import num_steps
from lobra.tasks.task_file import clip_context
from lobra.tasks.text_processor import TextProcessor
from lobra.trainer.batching import fixed_buckets
from lobra.trainer.checkpoint import CheckpointState
from lobra.trainer.live_tasks import present_tasks
from lobra.trainer.request import TrainRequest
from lobra.trainer.resume_checks import task_record
from lobra.trainer.run_inputs import RunInputs
from lobra.trainer.task_data import TaskChecks, tasks_with_data


@dataclass(frozen=True, eq=False)
class TrainedTasks:
    """The tasks of a run with their data; none where they cannot be trained.

    Attributes
    ----------
    data_day
        The date (ISO) that chat templates with a date were told.
    tasks, datasets
        The tasks, and the data of each.
    training, validation
        Of the data what is trained on, and what is held out, if anything is.
    buckets
        The padded lengths of all steps, where these are fixed.
    """

    data_day: str
    tasks: tuple[TaskConfig, ...] = ()
    datasets: tuple[TokenizedDataset, ...] = ()
    training: tuple[TokenizedDataset, ...] = ()
    validation: tuple[TokenizedDataset | None, ...] = ()
    buckets: tuple[int, ...] = ()

    @cached_property
    def records(self) -> tuple[dict[str, Any], ...]:
        """What checkpoints know the tasks by."""
        return tuple(map(task_record, self.tasks, self.training))

    @cached_property
    def num_steps(self) -> dict[str, int]:
        """The steps that each task makes, by name."""
        pairs = zip(self.tasks, self.training, strict=True)
        return {task.name: num_steps(task, data.num_examples) for task, data in pairs}


def read_tasks(
    request: TrainRequest,
    inputs: RunInputs,
    batching: Batching | None,
    problems: Problems,
    bad_tasks: Problems,
) -> TrainedTasks:
    """Return the tasks with their data, tokenised: all of them, or those that are not left out.

    ``bad_tasks`` gets what is wrong with tasks: other problems than ``problems`` if they are left
    out for that.
    """
    state, config, folder = inputs.state, inputs.config, inputs.folder
    day = date.fromisoformat(state.data_day) if state and state.data_day else date.today()
    nothing = TrainedTasks(day.isoformat())
    if config is None or folder is None:
        return nothing
    checks = TaskChecks(
        TextProcessor.of_folder(lambda: folder, day),
        request.data_dir,
        inputs.shape,
        inputs.plan,
        batching,
        request.confine,
        not request.is_resumed,
        partial(_is_over, request, state),
    )
    kept: list[tuple[TaskConfig, TokenizedDataset]] = []
    num_wanted = 0
    for part in problems.result_of(present_tasks, config, state, request.watch_tasks) or ():
        clipped = clip_context(part.tasks, request.max_seq_length)
        kept += tasks_with_data(part, clipped, checks, bad_tasks)
        num_wanted += len(clipped)
    if request.skip_bad_tasks and not kept:
        problems += bad_tasks
    if not kept or (len(kept) < num_wanted and not request.skip_bad_tasks):
        return nothing
    tasks, datasets = zip(*kept, strict=True)
    buckets = None
    if inputs.plan is not None and batching == "bucketed" and request.dp_bucket == "off":
        buckets = problems.result_of(fixed_buckets, request.num_buckets, datasets, inputs.plan)
    training, validation = zip(*(split(*pair, request.seed) for pair in kept), strict=True)
    return TrainedTasks(nothing.data_day, tasks, datasets, training, validation, buckets or ())


def _is_over(
    request: TrainRequest,
    state: CheckpointState | None,
    task: TaskConfig,
    data: TokenizedDataset,
) -> bool:
    """Return whether a task was over at a checkpoint, and is not to go on."""
    if state is None or (made := state.progress.get(task.name)) is None:
        return False
    if made.stopped is not None:
        return task.name not in request.revive
    training, _ = split(task, data, request.seed)
    return made.steps >= num_steps(task, training.num_examples)


def last_step(
    state: CheckpointState | None,
    revived: Sequence[str],
    num_steps: Mapping[str, int],
    max_steps: int | None,
) -> int:
    """Return the run's step by which every task has made its own steps; at most `max_steps`."""
    begun, left = 0, list(num_steps.values())
    if state is not None:
        begun = state.step
        left = [
            max(0, num_steps[name] - progress.steps)
            for name, progress in state.progress.items()
            if name in num_steps and (progress.stopped is None or name in revived)
        ]
    end = begun + max(left, default=0)
    return end if max_steps is None else min(end, max_steps)
