"""Which sequences a task draws in a step: pure functions of (seed, task, step).

Nothing is remembered between calls, so a run that resumes at step 17 draws what the first run drew.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lobra.tasks.config import TaskConfig

Indices = NDArray[np.int64]

_EPOCH_STREAM, _VALIDATION_STREAM = 0, 1


def sample_indices(num_sequences: int, batch_size: int, seed: int, step: int) -> Indices:
    """Return the indices of the sequences of one step's batch, int64 [batch_size].

    The epochs, each a seeded permutation of all sequences, are laid end to end and cut into batches
    without a gap: batch ``step`` is positions ``step * batch_size`` and following. So each sequence
    is drawn exactly once per epoch, also where a batch spans epochs or is larger than the data.

    Raises
    ------
    ValueError
        If there is no sequence, or a negative size, seed or step.
    """
    if num_sequences < 1 or batch_size < 0 or seed < 0 or step < 0:
        raise ValueError(
            f"cannot draw batch {step} of {batch_size} from {num_sequences} sequences, seed {seed}"
        )
    batch = np.empty(batch_size, dtype=np.int64)
    filled = 0
    while filled < batch_size:
        epoch, position = divmod(step * batch_size + filled, num_sequences)
        part = _permutation(num_sequences, seed, _EPOCH_STREAM, epoch)[position:]
        part = part[: batch_size - filled]
        batch[filled : filled + len(part)] = part
        filled += len(part)
    return batch


def num_steps(task: TaskConfig, num_sequences: int) -> int:
    """Return how many steps a task runs: ``steps`` if given, else until ``epochs`` are complete.

    With epochs the last step may reach into one more epoch: every sequence is seen at least
    ``epochs`` times, and every batch has its full size.

    Raises
    ------
    ValueError
        If there is no sequence.
    """
    if num_sequences < 1:
        raise ValueError(f"task {task.name!r} has no sequence")
    if task.steps is not None:
        return task.steps
    return -(-task.epochs * num_sequences // task.global_batch_size)


def task_seed(task: TaskConfig, run_seed: int = 0) -> int:
    """Return the seed of a task in a run (`seed_of`)."""
    return seed_of(task.name, task.seed, run_seed)


def seed_of(name: str, own_seed: int, run_seed: int) -> int:
    """Return the seed of a task in a run, from the run's seed, the task's seed and its name.

    It does not depend on the other tasks: a task trained alone draws what it draws among others.
    Non-negative, below 2**63, the same on every machine.
    """
    key = f"{run_seed}\0{own_seed}\0{name}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def split_sequences(task: TaskConfig, rows: Indices, run_seed: int) -> tuple[Indices, Indices]:
    """Return (training indices, validation indices) of a task's sequences in a run, ascending.

    ``rows`` is int64 [num_sequences]: the row that each is from, ascending from 0 without a gap.
    Sequences of one row (turns of a conversation) stay on one side.
    """
    seed = task_seed(task, run_seed)
    held_out = split_validation(int(rows[-1]) + 1, task.validation_split, seed)[1]
    is_held_out = np.isin(rows, held_out)
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def split_validation(num_sequences: int, share: float, seed: int) -> tuple[Indices, Indices]:
    """Return (training indices, validation indices), both ascending, disjoint and complete.

    ``share`` of the sequences, rounded to the nearest, is held out; at least one if ``share`` > 0
    and there are two sequences, and never all.
    """
    held_out = min(round(share * num_sequences), num_sequences - 1)
    if share > 0 and num_sequences > 1:
        held_out = max(held_out, 1)
    order = _permutation(num_sequences, seed, _VALIDATION_STREAM, 0)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


@lru_cache(maxsize=64)
def _permutation(num_sequences: int, seed: int, stream: int, epoch: int) -> Indices:
    """Return a seeded permutation (read-only, int64 [num_sequences]).

    Sorts random 64-bit words, because numpy keeps the words of a bit generator the same in every
    version, which it does not promise for ``Generator.permutation``.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, stream, epoch])).random_raw(num_sequences)
    order = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order
