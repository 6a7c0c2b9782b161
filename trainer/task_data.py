"""The tasks of a run with their data: tokenised, checked against plan and model, one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lobra.common.errors import ConfigError, Problems, without_values
from lobra.layout.plan import Plan
from lobra.layout.sequences import Batching, packed_tokens
from lobra.layout.shapes import ModelShape
from lobra.model.adapter_checks import adapter_problems
from lobra.planner.bucketed.buckets import ALIGN
from lobra.tasks.config import TaskConfig
from lobra.tasks.confinement import is_inside
from lobra.tasks.dataset import TokenizedDataset, at_field, load_dataset, named_data
from lobra.tasks.objectives import COMPARING
from lobra.tasks.task_file import TrainerConfig
from lobra.tasks.text_processor import TextProcessor
from lobra.trainer.adapters import adapter_spec, check_adapter

log = logging.getLogger(__name__)

#: Times the tokens of all other tasks that a task may have in a step before that is warned of.
GREEDY = 10


@dataclass(frozen=True)
class TaskChecks:
    """What tasks are checked against.

    Attributes
    ----------
    processor
        The model's, for texts.
    data_dir
        Where data sets lie.
    shape, plan
        The model and the plan, None where they are of no use themselves.
    batching
        How the run's micro-batches are made; None where that is wrong itself.
    confine
        The folder that paths of tasks must lie in; None: anywhere.
    starts
        Whether tasks begin anew: those of a run that goes on have their adapters in its checkpoint.
    is_over
        Says of a task with its data whether it takes part in no step any more, so that a plan need
        not hold its sequences.
    """

    processor: TextProcessor
    data_dir: Path
    shape: ModelShape | None
    plan: Plan | None
    batching: Batching | None
    confine: Path | None = None
    starts: bool = True
    is_over: Callable[[TaskConfig, TokenizedDataset], bool] = lambda _task, _data: False

    def data_of(self, task: TaskConfig) -> tuple[TokenizedDataset | None, Problems]:
        """Return a task's data, None if there are none, and what is wrong with it and them.

        A problem begins with the field of the task that it is about.
        """
        problems = Problems()
        if self.shape is not None:
            problems += adapter_problems(task, self.shape)
            if task.resume_from and self.starts:
                problems += self._start_problems(task, Path(task.resume_from), self.shape)
        vocab_size = self.shape.vocab_size if self.shape else None
        data = None
        try:
            data = load_dataset(task, self.processor, self.data_dir, vocab_size, self.confine)
        except ConfigError as error:
            problems += error.problems.changed(partial(at_field, task))
        if self.batching == "bucketed" and task.objective in COMPARING:
            problems.add(
                f"objective = {task.objective!r}: bucketed micro-batches have a sequence a row and "
                "no examples of several: give --batching packed, or plan so"
            )
        if data is not None and self.plan is not None and not self.is_over(task, data):
            problems += too_long(task, data, self.plan, self.batching)
        if data is not None and self.shape is not None:
            problems += _foreign_tokens(task, data, self.shape)
        return data, problems if self.confine is None else problems.changed(without_values)

    def _start_problems(self, task: TaskConfig, start: Path, shape: ModelShape) -> Problems:
        if not is_inside(start, self.confine):
            return Problems([f"resume_from = {str(start)!r}: is not in {self.confine} (--confine)"])
        return check_adapter(start, adapter_spec(task), shape).prefixed("resume_from: ")


def tasks_with_data(
    config: TrainerConfig, tasks: Sequence[TaskConfig], checks: TaskChecks, left_out: Problems
) -> list[tuple[TaskConfig, TokenizedDataset]]:
    """Return those tasks of a file that can be trained; ``left_out`` gets what is wrong else."""
    kept = []
    for number, task in zip(config.numbers, tasks, strict=True):
        data, problems = checks.data_of(task)
        left_out += problems.prefixed(f"{config.path}: task[{number}].")
        if data is not None and not problems:
            kept.append((task, data))
    return kept


def warn_of_greedy_tasks(tasks: Sequence[TaskConfig], datasets: Sequence[TokenizedDataset]) -> None:
    """Warn of a task whose batches make every other task's steps many times as long."""
    tokens = [
        task.global_batch_size * float(data.example_lengths.mean())
        for task, data in zip(tasks, datasets, strict=True)
    ]
    total = sum(tokens)
    for task, own in zip(tasks, tokens, strict=True):
        if len(tasks) > 1 and own > GREEDY * (total - own):
            log.warning(
                "task %s: with global_batch_size %d it is %.1f %% of a step's tokens: the steps of "
                "all other tasks take about %.0f times as long as without it",
                task.name, task.global_batch_size, 100 * own / total, total / (total - own),
            )  # fmt: skip


def warn_of_long_contexts(
    tasks: Sequence[TaskConfig], datasets: Sequence[TokenizedDataset], shape: ModelShape
) -> None:
    """Warn of tasks whose sequences may be longer than what the model was made for."""
    for task, data in zip(tasks, datasets, strict=True):
        if shape.max_positions is not None and task.context_length > shape.max_positions:
            log.warning(
                "task %s: its context_length %d is beyond the model's max_position_embeddings %d "
                "(its longest sequence has %d tokens); what lies beyond may be learnt badly",
                task.name, task.context_length, shape.max_positions, int(data.lengths.max()),
            )  # fmt: skip


def too_long(
    task: TaskConfig, data: TokenizedDataset, plan: Plan, batching: Batching | None
) -> list[str]:
    """Return a problem if the task has a sequence that no replica of the plan can take.

    Bucketed, a sequence is padded; packed, one that is alone is not.
    """
    capacity = plan.max_tokens
    lengths = data.example_lengths
    if data.sequences_of_example > 1:
        lengths = packed_tokens(lengths)
    multiple = ALIGN if batching == "bucketed" else 1
    padded = -(-lengths // multiple) * multiple
    if padded.max() <= capacity:
        return []
    longest, count = int(lengths.max()), int((padded > capacity).sum())
    whole = capacity // multiple * multiple
    remedies = (
        f"lower its context_length to {whole}, give --max-seq-length so for every task, or "
        if whole
        else ""
    )
    return [
        f"context_length = {task.context_length}: {count} of {len(lengths)} sequences of task "
        f"{task.name} are longer than any replica can take (longest {longest} tokens, computed as "
        f"{int(padded.max())}, largest max_tokens {capacity}); {remedies}plan for the longer length"
    ]


def _foreign_tokens(task: TaskConfig, data: TokenizedDataset, shape: ModelShape) -> list[str]:
    """Return a problem if token ids of the task exceed the model's vocabulary."""
    largest = int(data.tokens.max())
    if largest < shape.vocab_size:
        return []
    return [
        f"{named_data(task)}: token id {largest} is outside the model's vocabulary of "
        f"{shape.vocab_size}; the data was tokenised for another model"
    ]
