"""Global batches: which sequences a step trains, and the tensors of a dispatched micro-batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lobra.model.stage import IGNORED_LABEL, MicroBatchTensors, Targets, find_targets
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.tasks.sampling import sample_indices, task_seed

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class GlobalBatch:
    """The sequences of one step over all running tasks: parallel arrays of equal size.

    `tasks[i]` is the task of sequence i, `indices[i]` its place in the task's data set,
    `lengths[i]` its tokens. Sequences are ordered by task.
    """

    tasks: IntArray
    indices: IntArray
    lengths: IntArray

    def __len__(self) -> int:
        return len(self.tasks)


def draw_global_batch(
    tasks: Sequence[TaskConfig],
    datasets: Sequence[TokenizedDataset],
    running: Sequence[bool],
    seed: int,
    step: int,
) -> GlobalBatch:
    """Return the global batch of `step` (0-based) over the running tasks.

    What a task contributes is a pure function of (seed, task, step).
    """
    parts = []
    for number, (task, dataset) in enumerate(zip(tasks, datasets, strict=True)):
        if running[number]:
            indices = sample_indices(
                len(dataset), task.global_batch_size, task_seed(task, seed), step
            )
            parts.append((number, indices, dataset.lengths[indices]))
    return _concatenate(parts)


def whole_batch(datasets: Sequence[TokenizedDataset | None]) -> GlobalBatch:
    """Return the batch of every sequence of the given data sets (None: no data of that task)."""
    parts = [
        (number, np.arange(len(data)), data.lengths)
        for number, data in enumerate(datasets)
        if data is not None
    ]
    return _concatenate(parts)


def _concatenate(parts: Sequence[tuple[int, IntArray, IntArray]]) -> GlobalBatch:
    """Return the batch of (task number, indices, lengths) parts."""
    empty = [np.empty(0, dtype=np.int64)]
    tasks = [np.full(len(indices), number, dtype=np.int64) for number, indices, _ in parts]
    indices = [np.asarray(indices, dtype=np.int64) for _, indices, _ in parts]
    lengths = [np.asarray(lengths, dtype=np.int64) for _, _, lengths in parts]
    return GlobalBatch(
        np.concatenate(tasks or empty),
        np.concatenate(indices or empty),
        np.concatenate(lengths or empty),
    )


def count_targets(data: TokenizedDataset) -> IntArray:
    """Return each sequence's number of positions with a loss [num_sequences].

    A sequence's first token is never predicted, so its label never counts.
    """
    counts = np.zeros(len(data), dtype=np.int64)
    some = np.flatnonzero(data.lengths)
    if len(some):
        starts = data.offsets[some]
        learned = data.labels != IGNORED_LABEL
        counts[some] = np.add.reduceat(learned, starts, dtype=np.int64) - learned[starts]
    return counts


def target_tokens(batch: GlobalBatch, counts: Sequence[IntArray | None]) -> IntArray:
    """Return each task's number of positions with a loss in the global batch [num_tasks].

    `counts[t]` is what `count_targets` says of task t's data.
    """
    totals = np.zeros(len(counts), dtype=np.int64)
    for task, own in enumerate(counts):
        if own is not None:
            totals[task] = own[batch.indices[batch.tasks == task]].sum()
    return totals


def micro_batch_tensors(
    batch: GlobalBatch,
    rows: IntArray,
    padded_length: int,
    datasets: Sequence[TokenizedDataset | None],
    task_weights: torch.Tensor,
    device: torch.device,
    seed: int,
) -> MicroBatchTensors:
    """Return the padded tensors of the micro-batch made of the global batch's `rows`.

    Rows of a task are made adjacent; padding is on the right and carries no label. The seed of
    LoRA dropout comes from `seed` and the sequences in the micro-batch. Everything goes to the
    device in one copy, which the host does not wait for; the labels themselves stay on the host.
    """
    rows = rows[np.lexsort((rows, batch.tasks[rows]))]
    row_tasks = tuple(int(task) for task in batch.tasks[rows])
    tokens = np.zeros((len(rows), padded_length), dtype=np.int64)
    labels = np.full((len(rows), padded_length), IGNORED_LABEL, dtype=np.int64)
    for place, row in enumerate(rows):
        sequence, targets = _sequence(datasets, int(batch.tasks[row]), int(batch.indices[row]))
        tokens[place, : len(sequence)] = sequence
        labels[place, : len(targets)] = targets
    labels_BS = torch.from_numpy(labels)
    found = find_targets(labels_BS, row_tasks)
    tokens_BS, *targets_T = to_device(
        [torch.from_numpy(tokens), found.positions_T, found.tokens_T, found.tasks_T], device
    )
    return MicroBatchTensors(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        row_tasks=row_tasks,
        task_weights=task_weights,
        noise_seed=_noise_seed(seed, batch.tasks[rows], batch.indices[rows]),
        targets=Targets(*targets_T),
    )


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return CPU tensors of one dtype on the device, sent in one copy of pinned memory."""
    if device.type == "cpu":
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory()
    parts = flat.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _sequence(
    datasets: Sequence[TokenizedDataset | None], task: int, index: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    data = datasets[task]
    assert data is not None, "a batch draws only from tasks that have data"
    return data.sequence(index)


def _noise_seed(seed: int, tasks: IntArray, indices: IntArray) -> int:
    content = np.concatenate([[seed], tasks, indices]).astype("<i8").tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "little")
