"""Which sequences a step trains."""

from __future__ import annotations

import hashlib

import numpy as np

from lobra.layout.sequences import Clipping, IntArray, Rollout, Sequence
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import MASKED, TokenizedDataset
from lobra.tasks.objectives import objective_of
from lobra.tasks.sampling import sample_indices, task_seed


def draw_sequences(
    number: int, task: TaskConfig, data: TokenizedDataset, run_seed: int, own_step: int
) -> list[Sequence]:
    """Return the sequences of a task's own step (0-based): a pure function of (seed, task, step).

    ``number`` is the task's in the run and has no part in what is drawn.
    """
    seed = task_seed(task, run_seed)
    drawn = sample_indices(data.num_examples, task.global_batch_size, seed, own_step)
    size = data.sequences_of_example
    indices = (drawn[:, None] * size + np.arange(size)).flatten()
    return [
        _sequence(number, task, data, index, _noise_seed(seed, own_step, place))
        for place, index in enumerate(indices.tolist())
    ]


def all_sequences(number: int, task: TaskConfig, data: TokenizedDataset) -> list[Sequence]:
    """Return every sequence of a task's data, to be evaluated."""
    return [_sequence(number, task, data, index) for index in range(len(data))]


def _sequence(
    number: int, task: TaskConfig, data: TokenizedDataset, index: int, noise_seed: int = 0
) -> Sequence:
    """Return a sequence of a task's data. A first token is never predicted, whatever its label."""
    tokens, labels = map(np.asarray, data.sequence(index))  # a mapped file's views are slow
    targets = np.flatnonzero(labels[1:] != MASKED).astype(np.int32) + np.int32(1)
    if data.signs is None:
        rollout = None
        if sampled := data.sampled(index):
            clipping = Clipping(task.clip_low, task.clip_high)
            logprobs, advantages = (own[targets] for own in sampled)
            rollout = Rollout(logprobs, advantages, clipping)
        return Sequence(number, index, tokens, targets, noise_seed, rollout=rollout)
    sign, num_answer = int(data.signs[index]), len(targets)
    objective = objective_of(task)
    if objective is not None and objective.learns_prompts and sign > 0:
        targets = np.arange(1, len(tokens), dtype=np.int32)
    return Sequence(number, index, tokens, targets, noise_seed, sign=sign, num_answer=num_answer)


def _noise_seed(*values: int) -> int:
    """Return a number below 2**56 that depends on all of these, and on their order."""
    content: IntArray = np.array(values, dtype="<i8")
    return int.from_bytes(hashlib.sha256(content.tobytes()).digest()[:7], "little")
