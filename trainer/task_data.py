"""The tasks' data of a run: tokenised, checked against plan and model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lobra.common.errors import ConfigError, Problems
from lobra.layout.plan import Plan
from lobra.layout.sequences import Batching
from lobra.layout.shapes import ModelShape
from lobra.planner.bucketed.buckets import ALIGN
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset, load_dataset
from lobra.tasks.text_processor import TextProcessor


def load_datasets(
    problems: Problems,
    source: Path,
    tasks: Sequence[TaskConfig],
    processor: TextProcessor,
    data_dir: Path,
    vocab_size: int | None,
) -> list[TokenizedDataset]:
    """Return every task's tokenised data, or [] after adding what is wrong to `problems`."""
    datasets = []
    for number, task in enumerate(tasks):
        try:
            datasets.append(load_dataset(task, processor, data_dir, vocab_size))
        except ConfigError as error:
            where = f"{source}: task[{number}]"
            problems += error.problems.changed(partial(_at_field, where, task))
    if len(datasets) < len(tasks):
        return []
    return datasets


def _at_field(where: str, task: TaskConfig, problem: str) -> str:
    """Return a problem of a task's data with the field of the configuration it is about."""
    if problem.startswith("dataset_name = "):
        return f"{where}.{problem}"
    return f"{where}.{_named_data(task)}: {problem}"


def _named_data(task: TaskConfig) -> str:
    """Return the task's data sets as its configuration has them."""
    names = task.dataset_names
    return f"dataset_name = {names[0] if len(names) == 1 else list(names)!r}"


def too_long(
    tasks: Sequence[TaskConfig],
    datasets: Sequence[TokenizedDataset],
    plan: Plan,
    batching: Batching | None,
    source: Path,
) -> list[str]:
    """Return a problem for every task with a sequence that no replica of the plan can take.

    Bucketed, a sequence is padded; packed, one that is alone is not. `source` is the trainer
    configuration.
    """
    capacity = plan.max_tokens
    multiple = ALIGN if batching == "bucketed" else 1
    problems = []
    for number, (task, data) in enumerate(zip(tasks, datasets, strict=False)):
        longest = int(data.lengths.max())
        padded = -(-data.lengths // multiple) * multiple
        if padded.max() > capacity:
            count = int((padded > capacity).sum())
            problems.append(
                f"{source}: task[{number}].context_length = {task.context_length}: {count} of "
                f"{len(data)} sequences of task {task.name} are longer than any replica "
                f"can take (longest {longest} tokens, computed as {int(padded.max())}, "
                f"largest max_tokens {capacity}); lower its context_length to "
                f"{capacity // multiple * multiple}, give --max-seq-length so for every task, or "
                f"plan for the longer length"
            )
    return problems


def foreign_tokens(
    tasks: Sequence[TaskConfig],
    datasets: Sequence[TokenizedDataset],
    shape: ModelShape,
    source: Path,
) -> list[str]:
    """Return a problem for every task whose token ids exceed the model's vocabulary."""
    problems = []
    for number, (task, data) in enumerate(zip(tasks, datasets, strict=False)):
        where = f"{source}: task[{number}].{_named_data(task)}"
        largest = int(data.tokens.max())
        if largest >= shape.vocab_size:
            problems.append(
                f"{where}: token id {largest} is outside the model's vocabulary of "
                f"{shape.vocab_size}; the data was tokenised for another model"
            )
    return problems
