"""Which sequences a step trains, and the tensors that a micro-batch of them becomes."""

from __future__ import annotations

import hashlib
from collections import abc

import numpy as np
import torch

from lobra.layout.sequences import IntArray, MicroBatch, Sequence
from lobra.model.stage import MicroBatchTensors, Targets
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import MASKED, TokenizedDataset
from lobra.tasks.sampling import sample_indices, task_seed


def draw_sequences(
    tasks: abc.Sequence[TaskConfig],
    datasets: abc.Sequence[TokenizedDataset],
    running: abc.Sequence[bool],
    seed: int,
    step: int,
) -> list[Sequence]:
    """Return the sequences of `step` (0-based) of all running tasks, ordered by task.

    What a task contributes is a pure function of (seed, task, step).
    """
    drawn: list[Sequence] = []
    for number, (task, dataset) in enumerate(zip(tasks, datasets, strict=True)):
        if running[number]:
            indices = sample_indices(
                len(dataset), task.global_batch_size, task_seed(task, seed), step
            )
            drawn += _sequences(number, dataset, indices.tolist())
    return drawn


def all_sequences(datasets: abc.Sequence[TokenizedDataset | None]) -> list[Sequence]:
    """Return every sequence of the tasks' data (None: there is none), ordered by task."""
    return [
        sequence
        for number, data in enumerate(datasets)
        if data is not None
        for sequence in _sequences(number, data, range(len(data)))
    ]


def _sequences(
    task: int, data: TokenizedDataset, indices: abc.Iterable[int]
) -> abc.Iterator[Sequence]:
    """Yield sequences of a task's data. A first token is never predicted, whatever its label."""
    for index in indices:
        tokens, labels = map(np.asarray, data.sequence(index))  # a mapped file's views are slow
        targets = np.flatnonzero(labels[1:] != MASKED).astype(np.int32) + np.int32(1)
        yield Sequence(task, index, tokens, targets)


def micro_batch_tensors(
    micro_batch: MicroBatch, task_weights: torch.Tensor, device: torch.device, seed: int
) -> MicroBatchTensors:
    """Return the tensors of a micro-batch, padded on the right.

    The seed of LoRA dropout comes from `seed` and the sequences in the micro-batch. Everything
    goes to the device in one copy, which the host does not wait for.
    """
    rows, length = micro_batch.sequences, micro_batch.padded_length
    assert length is not None, "a packed micro-batch"
    tokens_BS = np.zeros((len(rows), length), dtype=np.int64)
    positions, predicted = [], []
    for row, sequence in enumerate(rows):
        tokens_BS[row, : len(sequence.tokens)] = sequence.tokens
        positions.append(sequence.targets.astype(np.int64) + (row * length - 1))
        predicted.append(sequence.tokens[sequence.targets])
    row_tasks = np.array([sequence.task for sequence in rows], dtype=np.int64)
    tensors = [
        tokens_BS,
        np.concatenate(positions),
        np.concatenate(predicted, dtype=np.int64),
        np.repeat(row_tasks, [len(sequence.targets) for sequence in rows]),
    ]
    tokens, *targets = to_device([torch.from_numpy(values) for values in tensors], device)
    return MicroBatchTensors(
        tokens_BS=tokens,
        targets=Targets(*targets),
        row_tasks=tuple(row_tasks.tolist()),
        task_weights=task_weights,
        noise_seed=_noise_seed(seed, rows),
    )


def to_device(tensors: abc.Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return CPU tensors of one dtype on the device, sent in one copy of pinned memory."""
    if device.type == "cpu":
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory()
    parts = flat.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _noise_seed(seed: int, rows: abc.Sequence[Sequence]) -> int:
    values = [seed, *(row.task for row in rows), *(row.index for row in rows)]
    content: IntArray = np.array(values, dtype="<i8")
    return int.from_bytes(hashlib.sha256(content.tobytes()).digest()[:7], "little")
