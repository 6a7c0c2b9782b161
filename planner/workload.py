"""The workload: every task's sequence lengths and global batch size, from files or data sets."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lobra.common.errors import ConfigError, Problems
from lobra.layout.shapes import resolve_shape
from lobra.model.folder import tokenizer_folder
from lobra.profiler.cost_model import TokenShares
from lobra.tasks.config import TaskConfig
from lobra.tasks.lengths import load_lengths
from lobra.tasks.objectives import PASSES_BEFORE
from lobra.tasks.sampling import num_steps, sample_indices, seed_of, split_sequences
from lobra.tasks.target_modules import HEAD
from lobra.tasks.task_file import TrainerConfig, clip_context

if TYPE_CHECKING:
    from lobra.tasks.dataset import TokenizedDataset


log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Workload:
    """What the steps of a run draw from.

    Attributes
    ----------
    lengths
        By task name, int64 [n]: tokens of every sequence it trains on, cut to the task's limit.
    batch_sizes
        By task name, the sequences of one step.
    clipped
        By task name, how many sequences were cut, held-out ones included.
    held_out
        By task name, the lengths of what ``validation_split`` holds out: a plan must hold them too.
    seeds
        By task name, the tasks' own seeds (0).
    num_steps
        By task name, after how many steps the task ends (never).
    seed
        The run's.
    begun
        By task name, how many steps the task has made before the workload's first (0).
    """

    lengths: Mapping[str, np.ndarray]
    batch_sizes: Mapping[str, int]
    clipped: Mapping[str, int]
    held_out: Mapping[str, np.ndarray] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    num_steps: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    begun: Mapping[str, int] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of any task, those held out included."""
        every = [*self.lengths.values(), *self.held_out.values()]
        return max(int(values.max()) for values in every if len(values))

    def only(self, task: str) -> Workload:
        """Return the workload of one task alone; it draws what it draws among the others."""
        parts: dict[str, Any] = {
            name: {task: values[task]} if task in (values := getattr(self, name)) else {}
            for name in (
                *("lengths", "batch_sizes", "clipped", "held_out", "seeds", "num_steps"),
                "begun",
            )
        }
        return replace(self, **parts)

    def draw(self, step: int) -> dict[str, np.ndarray]:
        """Return, by task, the indices into its lengths that a step (from 0) trains, int64.

        They are those that `lobra train` draws with the same seed; without tasks that have ended.
        """
        return {
            task: sample_indices(
                len(values),
                self.batch_sizes[task],
                seed_of(task, self.seeds.get(task, 0), self.seed),
                step + self.begun.get(task, 0),
            )
            for task, values in self.lengths.items()
            if task not in self.num_steps or step + self.begun.get(task, 0) < self.num_steps[task]
        }

    def steps(self, number: int, first: int = 0) -> Iterator[np.ndarray]:
        """Yield int64 [global batch]: the lengths of every step; fewer where all tasks end."""
        for step in range(first, first + number):
            drawn = self.draw(step)
            if not drawn:
                return
            yield np.concatenate([self.lengths[task][own] for task, own in drawn.items()])


def make_workload(
    config: TrainerConfig,
    lengths: Mapping[str, np.ndarray],
    max_seq_length: int,
    seed: int = 0,
) -> Workload:
    """Return the workload of a trainer configuration over the given lengths in a run of ``seed``.

    Lengths are looked up by the task's name, then by its data set's. They are cut to the smaller
    of the task's context length and ``max_seq_length``. Each is a row of its own.

    Raises
    ------
    ConfigError
        For every task without lengths, and when ``max_seq_length`` is not positive.
    """
    problems = _length_problems(max_seq_length)
    training, held_out, clipped = [], [], []
    for task in config.tasks:
        values = lengths.get(task.name, _lengths_of_data(task, lengths))
        if values is None or len(values) == 0:
            have = ", ".join(sorted(lengths)) or "none"
            what = "no lengths" if values is None else "no sequence"
            problems.append(
                f"task {task.name!r} of {config.path}: {what} for it (data set "
                f"{', '.join(map(repr, task.dataset_names))}); there are: {have}"
            )
            continue
        limit = min(task.context_length, max_seq_length)
        values = np.asarray(values, dtype=np.int64)
        own, others = split_sequences(task, np.arange(len(values)), seed)
        cut = np.minimum(values, limit)
        training.append(cut[own])
        held_out.append(cut[others])
        clipped.append(int((values > limit).sum()))
    if problems:
        raise ConfigError(problems)
    return _workload(config.tasks, training, held_out, clipped, seed)


def _length_problems(max_seq_length: int) -> list[str]:
    if max_seq_length < 1:
        return [f"--max-seq-length: {max_seq_length}; at least 1 token is needed"]
    return []


def _workload(
    tasks: Sequence[TaskConfig],
    training: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    clipped: Sequence[int],
    seed: int,
) -> Workload:
    """Return the workload of tasks with these lengths to train on and to validate on."""
    names = [task.name for task in tasks]
    return Workload(
        dict(zip(names, training, strict=True)),
        {task.name: task.global_batch_size for task in tasks},
        dict(zip(names, clipped, strict=True)),
        dict(zip(names, held_out, strict=True)),
        {task.name: task.seed for task in tasks},
        {task.name: num_steps(task, len(own)) for task, own in zip(tasks, training, strict=True)},
        seed,
    )


def _lengths_of_data(task: TaskConfig, lengths: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the lengths of a task's rows, by the names of its data sets; None if one has none."""
    parts = [lengths.get(name) for name in task.dataset_names]
    if any(part is None for part in parts):
        return None
    return np.concatenate([np.asarray(part)[: task.max_samples] for part in parts])


def read_lengths(
    config: TrainerConfig, model: str, data_dir: str | os.PathLike[str]
) -> Mapping[str, np.ndarray]:
    """Return the lengths of every task's tokenised data set, what is held out included."""
    datasets = _load(config, model, data_dir)
    return {
        task.name: data.example_lengths for task, data in zip(config.tasks, datasets, strict=True)
    }


def read_workload(
    config: TrainerConfig,
    model: str,
    lengths_path: str | os.PathLike[str] | None,
    data_dir: str | os.PathLike[str],
    max_seq_length: int,
    seed: int = 0,
) -> tuple[Workload, TokenShares]:
    """Return the workload of a run of ``seed``, and what its tokens ask for.

    Lengths are from a file, which does not say how many carry a loss, or of the data sets,
    tokenised as `lobra train` does.

    Raises
    ------
    ConfigError
        With every mistake of the data sets, or of the file; see ``make_workload``.
    """
    if lengths_path is not None:
        lengths = load_lengths(Path(lengths_path))
        workload = make_workload(config, lengths, max_seq_length, seed)
        means = [float(workload.lengths[task.name].mean()) for task in config.tasks]
        return workload, _shares(config.tasks, means, None)
    if problems := _length_problems(max_seq_length):
        raise ConfigError(problems)
    from lobra.tasks.dataset import split

    tasks = clip_context(config.tasks, max_seq_length)
    datasets = _load(replace(config, tasks=tasks), model, data_dir)
    parts = [split(task, data, seed) for task, data in zip(tasks, datasets, strict=True)]
    training = [own for own, _ in parts]
    nothing = np.empty(0, dtype=np.int64)
    workload = _workload(
        tasks,
        [own.example_lengths for own in training],
        [nothing if others is None else others.example_lengths for _, others in parts],
        [data.num_truncated for data in datasets],
        seed,
    )
    return workload, token_shares(tasks, training)


def _load(
    config: TrainerConfig, model: str, data_dir: str | os.PathLike[str]
) -> list[TokenizedDataset]:
    """Return the data of every task of a file, tokenised; ConfigError with every mistake."""
    from lobra.tasks.data_report import summary_text
    from lobra.tasks.dataset import at_field, load_dataset
    from lobra.tasks.text_processor import TextProcessor

    # Data that are tokenised already need no tokenizer, so no folder of the model either.
    processor = TextProcessor.of_folder(lambda: tokenizer_folder(model))
    vocab_size = resolve_shape(model).vocab_size
    datasets: list[TokenizedDataset] = []
    problems = Problems()
    for number, task in zip(config.numbers, config.tasks, strict=True):
        try:
            datasets.append(load_dataset(task, processor, data_dir, vocab_size))
        except ConfigError as error:
            own = error.problems.changed(partial(at_field, task))
            problems += own.prefixed(f"{config.path}: task[{number}].")
    problems.raise_if_any()
    log.info("the tasks' data:\n%s", summary_text(datasets))
    return datasets


def token_shares(tasks: Sequence[TaskConfig], datasets: Sequence[TokenizedDataset]) -> TokenShares:
    """Return what the tokens of a step ask for, on average."""
    examples = [max(1, data.num_examples) for data in datasets]
    tokens, labels = (
        [size / number for size, number in zip(sizes, examples, strict=True)]
        for sizes in ([len(data.tokens) for data in datasets], [d.num_labels for d in datasets])
    )
    return _shares(tasks, tokens, labels)


def _shares(
    tasks: Sequence[TaskConfig], tokens: Sequence[float], labels: Sequence[float] | None
) -> TokenShares:
    """Return what tokens ask for where an example of each task has so many, and so many labels."""
    sizes = [task.global_batch_size for task in tasks]
    of_tokens = np.multiply(sizes, tokens)
    of_labels = of_tokens if labels is None else np.multiply(sizes, labels)
    if not of_labels.sum():
        return TokenShares()
    before = np.array([PASSES_BEFORE.get(task.objective, 0.0) for task in tasks])
    on_head = np.array([not task.trains_model and HEAD in task.target_modules for task in tasks])
    return TokenShares(
        None if labels is None else float(of_labels.sum() / of_tokens.sum()),
        float(before @ of_tokens / of_tokens.sum()),
        float((before + on_head) @ of_labels / of_labels.sum()),
    )
