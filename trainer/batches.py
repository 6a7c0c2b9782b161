"""Which sequences a step trains."""

from __future__ import annotations

import hashlib

import numpy as np

from lobra.layout.sequences import IntArray, Sequence
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import MASKED, TokenizedDataset
from lobra.tasks.sampling import sample_indices, task_seed


def draw_sequences(
    number: int, task: TaskConfig, data: TokenizedDataset, run_seed: int, own_step: int
) -> list[Sequence]:
    """Return the sequences of a task's own step (0-based): a pure function of (seed, task, step).

    ``number`` is the task's in the run and has no part in what is drawn.
    """
    seed = task_seed(task, run_seed)
    indices = sample_indices(len(data), task.global_batch_size, seed, own_step)
    return [
        _sequence(number, data, index, _noise_seed(seed, own_step, place))
        for place, index in enumerate(indices.tolist())
    ]


def all_sequences(number: int, data: TokenizedDataset) -> list[Sequence]:
    """Return every sequence of a task's data, to be evaluated."""
    return [_sequence(number, data, index) for index in range(len(data))]


def _sequence(number: int, data: TokenizedDataset, index: int, noise_seed: int = 0) -> Sequence:
    """Return a sequence of a task's data. A first token is never predicted, whatever its label."""
    tokens, labels = map(np.asarray, data.sequence(index))  # a mapped file's views are slow
    targets = np.flatnonzero(labels[1:] != MASKED).astype(np.int32) + np.int32(1)
    return Sequence(number, index, tokens, targets, noise_seed)


def _noise_seed(*values: int) -> int:
    """Return a number below 2**56 that depends on all of these, and on their order."""
    content: IntArray = np.array(values, dtype="<i8")
    return int.from_bytes(hashlib.sha256(content.tobytes()).digest()[:7], "little")
