"""Which sequences a step trains, and the tensors that a micro-batch of them becomes."""

from __future__ import annotations

import hashlib
from collections import abc

import numpy as np
import torch

from lobra.layout.sequences import IntArray, MicroBatch, Sequence
from lobra.model.stage import MicroBatchTensors, Targets
from lobra.model.token_tasks import row_segments
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


def micro_batch_tensors(
    micro_batch: MicroBatch, task_weights: torch.Tensor, device: torch.device
) -> MicroBatchTensors:
    """Return the tensors of a micro-batch, padded on the right.

    The seed of LoRA dropout comes from those of the sequences. Everything goes to the device in one
    copy, which the host does not wait for.
    """
    rows, length = micro_batch.sequences, micro_batch.padded_length
    assert length is not None, "a packed micro-batch"
    tokens_BS = np.zeros((len(rows), length), dtype=np.int64)
    positions, predicted = [], []
    for row, sequence in enumerate(rows):
        tokens_BS[row, : len(sequence.tokens)] = sequence.tokens
        positions.append(sequence.targets.astype(np.int64) + (row * length - 1))
        predicted.append(sequence.tokens[sequence.targets])
    tasks = np.array([sequence.task for sequence in rows], dtype=np.int64)
    tensors = [
        tokens_BS,
        np.concatenate(positions),
        np.concatenate(predicted, dtype=np.int64),
        np.repeat(tasks, [len(sequence.targets) for sequence in rows]),
    ]
    tokens, *targets = to_device([torch.from_numpy(values) for values in tensors], device)
    return MicroBatchTensors(
        tokens_BS=tokens,
        targets=Targets(*targets),
        segments=row_segments(tasks.tolist(), length),
        task_weights=task_weights,
        noise_seed=_noise_seed(*(sequence.noise_seed for sequence in rows)),
    )


def to_device(tensors: abc.Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return CPU tensors of one dtype on the device, sent in one copy of pinned memory."""
    if device.type == "cpu":
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory()
    parts = flat.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _noise_seed(*values: int) -> int:
    """Return a number below 2**56 that depends on all of these, and on their order."""
    content: IntArray = np.array(values, dtype="<i8")
    return int.from_bytes(hashlib.sha256(content.tobytes()).digest()[:7], "little")
