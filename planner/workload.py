"""The workload: every task's sequence lengths and global batch size, from files or data sets."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lobra.common.errors import ConfigError, Problems
from lobra.layout.shapes import resolve_shape
from lobra.model.folder import tokenizer_folder
from lobra.planner.buckets import bucket_index, expected_batch, plan_buckets, static_buckets
from lobra.tasks.config import TaskConfig, TrainerConfig
from lobra.tasks.lengths import load_lengths

if TYPE_CHECKING:
    from lobra.tasks.dataset import TokenizedDataset


log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Workload:
    """What a step draws from.

    Attributes
    ----------
    lengths
        By task name, int64 [n]: tokens of every sequence, cut to the task's limit.
    batch_sizes
        By task name, the sequences of one step.
    clipped
        By task name, how many sequences were cut.
    """

    lengths: Mapping[str, np.ndarray]
    batch_sizes: Mapping[str, int]
    clipped: Mapping[str, int]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of any task."""
        return max(int(values.max()) for values in self.lengths.values())

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Return int64: the lengths of one random step, each task's sequences without repeats.

        With fewer sequences than the global batch a task's are repeated.
        """
        drawn = [
            rng.choice(values, self.batch_sizes[task], replace=self.batch_sizes[task] > len(values))
            for task, values in self.lengths.items()
        ]
        return np.concatenate(drawn)


@dataclass(frozen=True, eq=False)
class ExpectedBatch:
    """The batch a plan is made for: ``counts`` sequences of each of the ``buckets``, int64 [R]."""

    counts: np.ndarray
    buckets: np.ndarray
    padding_ratio: float


def make_workload(
    config: TrainerConfig,
    lengths: Mapping[str, np.ndarray],
    max_seq_length: int,
) -> Workload:
    """Return the workload of a trainer configuration over the given lengths.

    Lengths are looked up by the task's name, then by its data set's. They are cut to the smaller
    of the task's context length and ``max_seq_length``.

    Raises
    ------
    ConfigError
        For every task without lengths, and when ``max_seq_length`` is not positive.
    """
    problems = []
    if max_seq_length < 1:
        problems.append(f"--max-seq-length: {max_seq_length}; at least 1 token is needed")
    cut, batch_sizes, clipped = {}, {}, {}
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
        cut[task.name] = np.minimum(values, limit)
        clipped[task.name] = int((values > limit).sum())
        batch_sizes[task.name] = task.global_batch_size
    if problems:
        raise ConfigError(problems)
    return Workload(cut, batch_sizes, clipped)


def _lengths_of_data(task: TaskConfig, lengths: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the lengths of a task's rows, by the names of its data sets; None if one has none."""
    parts = [lengths.get(name) for name in task.dataset_names]
    if any(part is None for part in parts):
        return None
    return np.concatenate([np.asarray(part)[: task.max_samples] for part in parts])


def read_lengths(
    config: TrainerConfig,
    model: str,
    lengths_path: str | os.PathLike[str] | None,
    data_dir: str | os.PathLike[str],
) -> Mapping[str, np.ndarray]:
    """Return every task's lengths: from a file of lengths, or by tokenising its data set."""
    return read_lengths_and_labels(config, model, lengths_path, data_dir)[0]


def read_lengths_and_labels(
    config: TrainerConfig,
    model: str,
    lengths_path: str | os.PathLike[str] | None,
    data_dir: str | os.PathLike[str],
) -> tuple[Mapping[str, np.ndarray], float | None]:
    """Return every task's lengths, and the share of a step's tokens that carry a loss.

    The share is None with a file of lengths, which does not say.

    Raises
    ------
    ConfigError
        With every mistake of the data sets, or of the file.
    """
    if lengths_path is not None:
        return load_lengths(Path(lengths_path)), None
    from lobra.tasks.data_report import summary_text
    from lobra.tasks.dataset import load_dataset
    from lobra.tasks.text_processor import TextProcessor

    # Data that are tokenised already need no tokenizer, so no folder of the model either.
    processor = TextProcessor.of_folder(lambda: tokenizer_folder(model))
    vocab_size = resolve_shape(model).vocab_size
    datasets: list[TokenizedDataset] = []
    problems = Problems()
    for task in config.tasks:
        try:
            datasets.append(load_dataset(task, processor, data_dir, vocab_size))
        except ConfigError as error:
            problems += error.problems
    problems.raise_if_any()
    log.info("the tasks' data:\n%s", summary_text(datasets))
    lengths = {task.name: data.lengths for task, data in zip(config.tasks, datasets, strict=True)}
    return lengths, label_share(config.tasks, datasets)


def label_share(tasks: Sequence[TaskConfig], datasets: Sequence[TokenizedDataset]) -> float | None:
    """Return the share of a step's tokens that carry a loss, on average; None without tokens."""
    labels = tokens = 0.0
    for task, data in zip(tasks, datasets, strict=True):
        if len(data):
            weight = task.global_batch_size / len(data)
            labels += weight * data.num_labels
            tokens += weight * len(data.tokens)
    return labels / tokens if tokens else None


def expect(workload: Workload, num_buckets: int, static: bool = False) -> ExpectedBatch:
    """Return the expected batch over dynamic or static buckets (CONTRACT, "Python CLI")."""
    if num_buckets < 1:
        raise ConfigError(f"--num-buckets: {num_buckets}; at least one bucket is needed")
    if static:
        buckets = static_buckets(num_buckets, workload.longest)
    else:
        buckets = plan_buckets(workload.lengths, workload.batch_sizes, num_buckets)
    counts = expected_batch(workload.lengths, workload.batch_sizes, buckets)
    real = padded = 0.0
    for task, values in workload.lengths.items():
        share = workload.batch_sizes[task] / len(values)
        real += share * float(values.sum())
        padded += share * float(buckets[bucket_index(values, buckets)].sum())
    return ExpectedBatch(counts, buckets, 1.0 - real / padded)
