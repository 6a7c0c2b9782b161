"""Whether a task may join a run: its fields, its data, its longest sequence, and its memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lobra.common.errors import ConfigError, Problems
from lobra.common.models import read_as
from lobra.layout.plan import Plan
from lobra.layout.shapes import ModelShape, read_shape
from lobra.profiler.capacity import fitted_to
from lobra.profiler.lookup import own_memory_path
from lobra.profiler.profiles import load_memory_profile
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset, split
from lobra.tasks.kinds import ADAMW_8BIT
from lobra.tasks.sampling import num_steps
from lobra.tasks.task_file import TrainerConfig, clip_context
from lobra.tasks.text_processor import TextProcessor
from lobra.trainer.eight_bit import eight_bit_problems
from lobra.trainer.evaluation import held_out_data
from lobra.trainer.request import TrainRequest
from lobra.trainer.resume_checks import task_record
from lobra.trainer.run_spec import DEFAULT_PERIOD, Admission, RunSpec
from lobra.trainer.task_data import TaskChecks, too_long
from lobra.trainer.task_progress import RunTask

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Newcomer:
    """A task that may join a run, if there is room for it.

    Attributes
    ----------
    config
        The task.
    training, validation
        What it trains on, and what is held out, if anything is.
    """

    config: TaskConfig
    training: TokenizedDataset
    validation: TokenizedDataset | None

    @property
    def pairs(self) -> list[tuple[TaskConfig, TokenizedDataset]]:
        """The task with what it trains on, and with what it holds out."""
        every = (self.training, self.validation)
        return [(self.config, data) for data in every if data is not None]

    @property
    def num_steps(self) -> int:
        """The steps it is to make."""
        return num_steps(self.config, self.training.num_examples)

    @property
    def record(self) -> dict[str, Any]:
        """What checkpoints know it by."""
        return task_record(self.config, self.training)

    def save_data(self, run: RunSpec) -> None:
        """Write its data where those of the run's tasks lie."""
        self.training.save(run.data_folder(self.config.name))
        if self.validation is not None:
            self.validation.save(run.validation_folder(self.config.name))


def admission_of(request: TrainRequest, config: TrainerConfig, plan: Plan) -> Admission:
    """Return what tasks that join a run are checked against.

    The memory profile is the one that the plan was made with, else the model's own, if it has one.
    """
    named = plan.meta.get("memory_profile", {}).get("file", "")
    path = (
        Path(named)
        if named
        else own_memory_path(request.model, len(config.tasks), request.base_precision)
    )
    memory = None
    if path.is_file():
        try:
            memory = load_memory_profile(path)
        except ConfigError as error:
            log.warning("the memory of tasks that join will not be looked at: %s", error)
    return Admission(
        plan,
        request.data_dir,
        memory,
        request.confine,
        request.max_seq_length,
        DEFAULT_PERIOD if request.validate_every is None else request.validate_every,
        config.path if request.watch_tasks else None,
    )


def newcomer_of(run: RunSpec, fields: Mapping[str, Any], processor: TextProcessor) -> Newcomer:
    """Return the task that these fields describe, with its data.

    Raises
    ------
    ConfigError
        With everything that is wrong with its fields, its data and the adapter it starts from.
    """
    assert run.admission is not None
    problems = Problems()
    task = read_as(TaskConfig, dict(fields), problems)
    problems.raise_if_any()
    assert task is not None
    if run.trains_model or task.trains_model:
        raise ConfigError("adapter: full trains the base itself: it has a run of its own")
    if run.replanning is not None and task.optimizer == ADAMW_8BIT:
        raise ConfigError("the run is planned anew, but moments in 8 bits go on on one plan only")
    plan = str(run.plan)
    Problems(eight_bit_problems([task], run.precision, plan, None)).raise_if_any()
    (task,) = clip_context([task], run.admission.max_seq_length)
    checks = TaskChecks(
        processor,
        run.admission.data_dir,
        base_shape(run),
        run.plan,
        run.batching,
        run.admission.confine,
    )
    data, problems = checks.data_of(task)
    if data is not None and run.buckets and data.lengths.max() > run.buckets[-1]:
        problems.add(f"its longest sequence is beyond the run's fixed buckets {run.buckets}")
    problems.raise_if_any()
    assert data is not None
    return Newcomer(task, *split(task, data, run.seed))


def base_shape(run: RunSpec) -> ModelShape:
    """Return the sizes of a run's base, its linears kept as the run keeps them."""
    return read_shape(run.model_folder).kept_in(run.base_precision)


def plan_beside(run: RunSpec, tasks: Sequence[TaskConfig]) -> tuple[Plan, str]:
    """Return the run's plan with the micro-batches that fit beside the adapters of these tasks.

    Returns
    -------
    tuple
        The plan, and what a person should know of how it was found; empty: nothing.

    Raises
    ------
    ConfigError
        If nothing fits on some replica.
    """
    admission = run.admission
    if admission is None:
        return run.plan, ""
    if admission.memory is None:
        return run.plan, "there is no memory profile: whether it fits was not looked at"
    fitted, notes = fitted_to(admission.memory, tasks, base_shape(run))
    groups, problems = [], Problems()
    for group in admission.plan.groups:
        layout = group.layout
        fits = group.max_tokens
        if admission.memory.max_tokens(layout.tp, layout.pp, layout.memory):
            fits = min(fits, fitted.max_tokens(layout.tp, layout.pp, layout.memory))
        if not fits:
            problems.add(
                f"a replica {layout} has no room beside the adapters of {len(tasks)} tasks "
                f"({admission.memory.path}); cancel tasks that are over"
            )
        groups.append(replace(group, max_tokens=max(fits, 1)))
    problems.raise_if_any()
    return replace(admission.plan, groups=tuple(groups)), "; ".join(notes)


def admit(run: RunSpec, tasks: Sequence[RunTask], new: Newcomer) -> str:
    """Check that a run has room for a task beside those it has, and write the task's data there.

    Returns
    -------
    str
        What a person should know of how it was found; empty: nothing.

    Raises
    ------
    ConfigError
        If it has none, or the data cannot be written.
    """
    plan, text = plan_beside(run, [*(task.config for task in tasks), new.config])
    held_out = ((task.config, held_out_data(run, task.config.name)) for task in tasks)
    own = [*((task.config, task.data) for task in tasks), *held_out]
    check_lengths(run, plan, [(task, data) for task, data in own if data is not None])
    check_lengths(run, plan, new.pairs)
    try:
        new.save_data(run)
    except OSError as error:
        raise ConfigError(f"its data cannot be written: {error}") from error
    return text


def check_lengths(
    run: RunSpec, plan: Plan, data: Iterable[tuple[TaskConfig, TokenizedDataset]]
) -> None:
    """Check that a plan takes all sequences of tasks, given with what they train on and hold out.

    Raises
    ------
    ConfigError
        With every task that has a longer one.
    """
    Problems(
        problem for task, own in data for problem in too_long(task, own, plan, run.batching)
    ).raise_if_any()
